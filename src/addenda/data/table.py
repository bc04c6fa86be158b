"""CSV and TSV: a header, then one row a record."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from addenda.data.embedded import parse_embedded
from addenda.data.jsonl import skip_line, too_long
from addenda.data.problem import Problem
from addenda.data.raw import RawRow

__all__ = ["Table", "cell_values"]

_JSON_COLUMNS = ("messages", "conversations", "contents", "history", "tools", "prompt", "completion")
_OPTIONAL = ("system", "input", "history", "tools")


class _TooLong(Exception):
    """The record went over the row limit."""


@dataclass
class _Lines:
    """The lines of a file as text, counting what one record takes."""

    file: BinaryIO
    limit: int
    position: int
    line: int = 0
    used: int = 0
    """Bytes of the current record."""
    nul: bool = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(self.limit + 1)
        if not raw:
            raise StopIteration
        self.position += len(raw)
        self.used += len(raw)
        self.line += 1
        if self.used > self.limit:
            raise _TooLong
        self.nul = self.nul or b"\x00" in raw
        return raw.decode("utf-8")

    def back_to(self, position: int, line: int) -> None:
        """Stand just after the line that starts at ``position``."""
        self.file.seek(position)
        self.position, self.line = position + skip_line(self.file), line


@dataclass
class Table:
    """Reader of separated values with a header; fields may be quoted and span lines."""

    path: Path
    start: int
    row_limit: int
    separator: str
    notes: tuple[str, ...] = ()
    kind: str = "csv"
    header: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The module's own limit is 128 KiB a field, below the row limit; raising it changes no one's results.
        csv.field_size_limit(max(csv.field_size_limit(), self.row_limit))

    def rows(self) -> Iterator[RawRow]:
        """Yield one row for each record, as a mapping from column to value."""
        with self.path.open("rb", buffering=1 << 20) as file:
            file.seek(self.start)
            lines = _Lines(file, self.row_limit, self.start)
            head = self._record(lines, csv.reader(lines, delimiter=self.separator, strict=True), -1)
            if head is None or head.problem or head.value is None:
                yield from [head] if head else []
                return
            self.header = [name.strip() for name in head.value["fields"]]
            twice = [name for name, count in Counter(self.header).items() if count > 1]
            if twice:
                found = f"the header names column '{twice[0]}' twice"
                yield RawRow(0, 1, self.start, problem=Problem("malformed_table", found))
                return
            yield from self._records(lines)

    def _records(self, lines: _Lines) -> Iterator[RawRow]:
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        index = 0
        while row := self._record(lines, reader, index):
            if row.problem:
                lines.back_to(row.position, row.line)
                reader = csv.reader(lines, delimiter=self.separator, strict=True)
            elif row.value is not None and row.value["fields"]:
                self._name_fields(row, row.value["fields"])
            else:  # a blank line
                continue
            yield row
            index += 1

    def _record(self, lines: _Lines, reader: Iterator[list[str]], index: int) -> RawRow | None:
        """Read one record; None at the end of the file."""
        row = RawRow(index, lines.line + 1, lines.position)
        lines.used, lines.nul = 0, False
        try:
            row.value = {"fields": next(reader)}
        except StopIteration:
            return None
        except _TooLong:
            row.problem = too_long(lines.used, self.row_limit)
            row.problem = Problem(
                row.problem.code, row.problem.found, fix="is a quote opened here and never closed?"
            )
        except csv.Error as error:
            row.problem = Problem("malformed_table", f"line {lines.line}: {error}")
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x} on line {lines.line}"
            row.problem = Problem("invalid_utf8", found)
        if lines.nul:
            row.problem = Problem("nul_character", "a zero byte")
        return row

    def _name_fields(self, row: RawRow, fields: list[str]) -> None:
        if len(fields) != len(self.header):
            found = f"{len(fields)} fields, the header has {len(self.header)}"
            row.value, row.problem = None, Problem("malformed_table", found)
            return
        row.value = cell_values(dict(zip(self.header, fields, strict=True)))

    def read_at(self, position: int) -> RawRow:
        """Read one record again."""
        with self.path.open("rb") as file:
            file.seek(position)
            lines = _Lines(file, self.row_limit, position)
            row = self._record(lines, csv.reader(lines, delimiter=self.separator, strict=True), -1)
            if row is None or row.value is None:
                return RawRow(-1, 0, position, problem=Problem("malformed_table", "the record is gone"))
            self._name_fields(row, row.value["fields"])
            return row


def cell_values(cells: dict[str, Any]) -> dict[str, Any]:
    """Read cells that hold JSON lists, and leave out optional ones that are empty.

    Example:
        >>> cell_values({"prompt": "[sic]", "completion": "b", "system": ""})
        {'prompt': '[sic]', 'completion': 'b'}
    """
    out: dict[str, Any] = {}
    for name, cell in cells.items():
        if cell in ("", None) and name in _OPTIONAL:
            continue
        if name in _JSON_COLUMNS and isinstance(cell, str) and cell.lstrip()[:2] in ("[{", "[["):
            # What does not parse is text that begins like a list; the checks say so where a list was needed.
            with contextlib.suppress(ValueError):
                cell = parse_embedded(cell)
        out[name] = cell
    return out
