"""One file for each start of a low-rank update; `addenda.core.starts` finds them, so nothing is listed here."""

from __future__ import annotations

__all__: list[str] = []
