"""JSON lines: one row a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from addenda.data.problem import Problem
from addenda.data.raw import RawRow

__all__ = ["JsonLines", "skip_line"]


@dataclass
class JsonLines:
    """Reader of a file with one JSON value on each line; blank lines are passed over."""

    path: Path
    start: int
    row_limit: int
    notes: tuple[str, ...] = ()
    kind: str = "jsonl"

    def rows(self) -> Iterator[RawRow]:
        """Yield the lines; one that is too long is passed over in pieces and yields only its problem."""
        with self.path.open("rb", buffering=1 << 20) as file:
            file.seek(self.start)
            position, line, index = self.start, 0, 0
            limit = self.row_limit
            while data := file.readline(limit + 1):
                line += 1
                length = len(data)
                if length > limit and not data.endswith(b"\n"):
                    length += skip_line(file)
                    yield RawRow(index, line, position, problem=too_long(length, limit))
                    index += 1
                elif not data.isspace():
                    yield RawRow(index, line, position, data)
                    index += 1
                position += length

    def read_at(self, position: int) -> RawRow:
        """Read one line again."""
        with self.path.open("rb") as file:
            file.seek(position)
            return RawRow(-1, 0, position, file.readline(self.row_limit + 1))


def skip_line(file: BinaryIO) -> int:
    """Pass over the rest of a line without holding it; return how many bytes it had."""
    passed = 0
    while piece := file.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def too_long(length: int, limit: int) -> Problem:
    """The problem of a row that was not read because of its length."""
    return Problem("row_too_long", f"a row of {length:,} bytes, the limit is {limit:,}")
