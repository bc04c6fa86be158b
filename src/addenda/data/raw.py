"""A row as it stands in a file, before it is understood; and what every file reader offers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from addenda.data.problem import Problem

__all__ = ["DEFAULT_ROW_LIMIT", "Container", "RawRow"]

DEFAULT_ROW_LIMIT = 1 << 20
"""Longest row that is read, in bytes."""


@dataclass(slots=True)
class RawRow:
    """One row: its bytes (JSON) or its values (tables), and where it starts."""

    index: int
    line: int
    position: int
    """Byte offset in the file; for parquet the row number. `Container.read_at` takes it."""
    data: bytes | None = None
    value: dict[str, Any] | None = None
    column: int = 1
    problem: Problem | None = None
    """Set where the reader could not get the row."""


class Container(Protocol):
    """A reader of one file format. Rows are read one at a time; no reader holds the file in memory."""

    kind: str
    """Name of the format, as printed: jsonl, json array, csv, tsv, parquet."""
    notes: tuple[str, ...]
    """What was noticed about the file: its encoding, its line ends."""

    def rows(self) -> Iterator[RawRow]:
        """Yield every row of the file in order."""
        ...

    def read_at(self, position: int) -> RawRow:
        """Read again the row that starts at a position ``rows`` gave."""
        ...
