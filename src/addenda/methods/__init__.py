"""One file for each method; the registry finds them, so nothing is listed here."""

from __future__ import annotations

__all__: list[str] = []
