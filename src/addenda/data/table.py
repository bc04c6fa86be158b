"""CSV and TSV: a header, then one row a record."""

from __future__ import annotations

import contextlib
import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, BinaryIO

from addenda.data.checks.encoding import InvalidUtf8
from addenda.data.embedded import parse_embedded
from addenda.data.jsonl import skip_line
from addenda.data.locate import line_and_column
from addenda.data.problem import Path, Problem
from addenda.data.raw import RawRow

__all__ = ["Table", "cell_values"]

_JSON_COLUMNS = ("messages", "conversations", "contents", "history", "tools", "prompt", "completion")
_QUOTED = re.compile(rb'"(?:[^"]++|"")*+"')
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
    record: bytearray = field(default_factory=bytearray)
    """What was read of the current record."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(self.limit + 1)
        if not raw:
            raise StopIteration
        self.position += len(raw)
        self.record += raw
        self.line += 1
        if len(self.record) > self.limit:
            raise _TooLong
        return raw.decode("utf-8")

    def back_to(self, position: int, line: int) -> None:
        """Stand just after the line that starts at ``position``."""
        self.file.seek(position)
        self.position, self.line = position + skip_line(self.file), line


@dataclass
class Table:
    """Reader of separated values with a header; fields may be quoted and span lines."""

    path: FilePath
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
                problem = Problem("malformed_table", found, fix="give each column a name of its own")
                yield RawRow(0, 1, self.start, problem=problem)
                return
            yield from self._records(lines)

    def _records(self, lines: _Lines) -> Iterator[RawRow]:
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        index = 0
        while row := self._record(lines, reader, index):
            if row.problem:
                if row.data is None:  # where the record ends is unknown: its quotes are wrong
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
        lines.record = bytearray()
        try:
            row.value = {"fields": next(reader)}
        except StopIteration:
            return None
        except _TooLong:
            found = f"a row of more than {self.row_limit:,} bytes"
            fix = "split or shorten the row; or is a quote opened here and never closed?"
            row.problem = Problem("row_too_long", found, fix=fix)
        except csv.Error as error:
            row.problem = Problem("malformed_table", f"line {lines.line}: {error}")
        except UnicodeDecodeError:
            row.data = bytes(lines.record)
            row.problem = next(InvalidUtf8.find(row.data))
        if b"\x00" in lines.record:
            row.data = bytes(lines.record)
            row.problem = Problem("nul_character", "a zero byte", offset=lines.record.index(b"\x00"))
        return row

    def at_cell(self, row: RawRow, path: Path) -> RawRow:
        """The row with the place of the cell a path leads into; as it was where it leads into none."""
        if row.problem or not path or path[0] not in self.header:
            return row
        with self.path.open("rb") as file:
            file.seek(row.position)
            lines = _Lines(file, self.row_limit, row.position)
            self._record(lines, csv.reader(lines, delimiter=self.separator, strict=True), -1)
        offset = _cell_start(lines.record, self.separator, self.header.index(str(path[0])))
        line, column = line_and_column(bytes(lines.record), offset, line=row.line, column=1)
        return replace(row, line=line, column=column)

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


def _cell_start(record: bytes | bytearray, separator: str, index: int) -> int:
    """Return the byte offset at which a cell of a well-formed record starts.

    Example:
        >>> _cell_start(b'"a, b",c,d', ",", 2)
        9
    """
    at = 0
    for _ in range(index):
        quoted = _QUOTED.match(record, at)
        at = record.index(separator.encode(), quoted.end() if quoted else at) + 1
    return at


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
