"""Parquet, read a few hundred rows at a time; the only file that knows pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.data.jsonl import too_long
from addenda.data.problem import Problem
from addenda.data.raw import RawRow
from addenda.data.table import cell_values
from addenda.errors import MissingDependencyError

__all__ = ["Parquet"]

_BATCH = 256


@dataclass
class Parquet:
    """Reader of a parquet file; a row's line is its number, counted from 1."""

    path: Path
    row_limit: int
    notes: tuple[str, ...] = ()
    kind: str = "parquet"

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows; a damaged file yields one problem."""
        pyarrow, parquet = _pyarrow()
        index = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_BATCH):
                    for record in batch.to_pylist():
                        yield self._row(record, index)
                        index += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0][:200]
            yield RawRow(index, index + 1, index, problem=Problem("unreadable_file", f"parquet: {reason}"))

    def _row(self, record: dict[str, Any], index: int) -> RawRow:
        row = RawRow(index, index + 1, index, value=cell_values(record))
        size = _text_size(record)
        if size > self.row_limit:
            row.value, row.problem = None, too_long(size, self.row_limit)
        return row

    def read_at(self, position: int) -> RawRow:
        """Read one row again; its whole row group is read for it."""
        _, parquet = _pyarrow()
        with parquet.ParquetFile(self.path) as file:
            before = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if position < before + count:
                    table = file.read_row_group(group).slice(position - before, 1)
                    return self._row(table.to_pylist()[0], position)
                before += count
        return RawRow(-1, 0, position, problem=Problem("unreadable_file", "the row is gone"))


def _text_size(value: object) -> int:
    """Characters in all strings of a nested value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_text_size(item) for item in value.values())
    return sum(_text_size(item) for item in value) if isinstance(value, list) else 0


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading parquet needs 'pyarrow', which is not installed",
            hint="pip install 'addenda[parquet]', or export the data as JSON lines",
        ) from error
    return pyarrow, pyarrow.parquet
