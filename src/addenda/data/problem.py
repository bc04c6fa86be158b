"""What a check says before its place in the file is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from addenda.data.findings import Severity

__all__ = ["Path", "Problem", "Turn"]

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One place in one row (or file) where a check fires; the reader turns it into a finding."""

    code: str
    found: str
    """What is there, values in quotes."""
    path: Path = ()
    fix: str = ""
    """Overrides the check's own fix where the remedy depends on what was found."""
    severity: Severity | None = None
    """Overrides the check's own severity."""
    offset: int | None = None
    """Byte offset inside the row, where it is known; else the place is looked up from the path."""


@dataclass(slots=True)
class Turn:
    """One message before it is known to be right: field values under their canonical names.

    ``names`` maps a canonical name to the path of that field below ``path``, because ShareGPT calls the
    role ``from`` and an Alpaca row has no message object at all.
    """

    path: Path
    fields: dict[str, Any]
    names: Mapping[str, Path]

    def at(self, field: str) -> Path:
        """Path of one field, or of the turn where the row does not have it."""
        return self.path + self.names.get(field, (field,))
