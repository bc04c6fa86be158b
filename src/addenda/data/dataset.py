"""Reading a data set: one pass that checks every row and remembers where each one is."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from addenda.core.progress import OnProgress, Progress
from addenda.data.checks import CHECKS
from addenda.data.duplicates import repeats
from addenda.data.examine import Examined, Examiner
from addenda.data.findings import Finding, Report, json_path
from addenda.data.locate import find_value, line_and_column
from addenda.data.problem import Problem
from addenda.data.raw import Container, RawRow
from addenda.data.rows import Conversation, RowRef
from addenda.data.source import open_container
from addenda.data.table import Table
from addenda.errors import DataError

__all__ = ["Dataset", "Rows", "read_file", "to_finding"]

_PROGRESS_BYTES = 4 << 20
_FEW_ROWS = 10
_UNUSED_KEYS = 20


@dataclass(eq=False)
class Dataset:
    """A file of training rows that was read once from end to end; its rows are read again when they are asked for."""

    name: str
    """The path as the user gave it; ``<stdin>`` for standard input."""
    path: Path
    container: Container | None = field(repr=False)
    examiner: Examiner = field(repr=False)
    report: Report = field(repr=False, default_factory=Report)
    """Every finding."""
    sha256: str = ""
    """Hash of the file's bytes."""
    row_count: int = 0
    """Rows in the file, good and bad."""
    shapes: Counter[str] = field(default_factory=Counter)
    """How many rows have which shape."""
    positions: array[int] = field(repr=False, default_factory=lambda: array("q"))
    """Where each good row starts."""
    lines: array[int] = field(repr=False, default_factory=lambda: array("I"))
    """The line each good row starts on."""
    digests: bytearray = field(repr=False, default_factory=bytearray)
    """16 bytes for each good row, equal for rows that teach the same."""
    valid: Dataset | None = None
    """The validation rows that came with a folder, if any."""
    test: Dataset | None = None
    """The test rows that came with a folder, if any; nothing trains on or selects by them."""

    def __len__(self) -> int:
        """Number of rows without errors."""
        return len(self.positions)

    @property
    def shape(self) -> str:
        """The shape most rows have; empty where no row is good."""
        return self.shapes.most_common(1)[0][0] if self.shapes else ""

    @property
    def detected(self) -> str:
        """What the file is, in words: format, shape, rows, encoding."""
        if self.container is None:
            return "not readable"
        shapes = [
            f"{name} ({count})" if len(self.shapes) > 1 else name for name, count in self.shapes.most_common()
        ]
        rows = f"{self.row_count:,} row{'' if self.row_count == 1 else 's'}"
        return ", ".join(
            [self.container.kind, *([" and ".join(shapes)] if shapes else []), rows, *self.container.notes]
        )

    @property
    def conversations(self) -> Rows:
        """All good rows, read from the file as they are asked for."""
        return Rows(self, range(len(self)))

    def digest(self, row: int) -> bytes:
        """16 bytes that two rows share exactly when they teach the same."""
        return bytes(self.digests[16 * row : 16 * row + 16])

    def require_clean(self) -> Dataset:
        """Return the data set if no run needs to fear it.

        Raises:
            DataError: it, or its validation or test rows, have errors; the message shows the first 20.
        """
        wrong = [
            part for part in (self, self.valid, self.test) if part is not None and part.report.has_errors
        ]
        if wrong:
            errors = sum(part.report.errors for part in wrong)
            text = "\n".join(line for part in wrong for line in part.report.lines())
            noun = "error" if errors == 1 else "errors"
            raise DataError(
                f"'{self.name}' has {errors:,} {noun}; nothing was trained\n{text}",
                where={"read as": self.detected},
                hint="correct these places and run it again",
            )
        return self

    def verify(self) -> None:
        """Check that the file is still what was read.

        Raises:
            DataError: its content changed, or it is gone.
        """
        for part in (self, self.valid):
            if part is not None and _sha256(part.path, part.name) != part.sha256:
                raise _changed(part.name)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a data set, in file order; iterating reads the file once and holds one row at a time."""

    dataset: Dataset
    indices: Sequence[int] = field(repr=False)
    """Ascending positions among the good rows."""

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Conversation]:
        container, positions = self.dataset.container, self.dataset.positions
        if container is None:
            return
        wanted = iter(self.indices)
        row = next(wanted, None)
        for raw in container.rows():
            if row is None:
                return
            if raw.position == positions[row]:
                yield self._conversation(raw)
                row = next(wanted, None)
        if row is not None:
            raise _changed(self.dataset.name)

    def __getitem__(self, index: int) -> Conversation:
        container = self.dataset.container
        if container is None or not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.indices[index]
        raw = container.read_at(self.dataset.positions[row])
        raw.index, raw.line = row, self.dataset.lines[row]
        return self._conversation(raw)

    def _conversation(self, raw: RawRow) -> Conversation:
        ref = RowRef(self.dataset.name, raw.line, raw.index)
        conversation = self.dataset.examiner.examine(raw, ref).conversation
        if conversation is None:
            raise _changed(self.dataset.name)
        return conversation


def read_file(
    path: Path, name: str, *, examiner: Examiner, row_limit: int, on_progress: OnProgress | None
) -> Dataset:
    """Read and check one file."""
    opened = open_container(path, suffix=Path(name).suffix.lower(), row_limit=row_limit)
    dataset = Dataset(name, path, None if isinstance(opened, Problem) else opened, examiner)
    dataset.sha256 = _sha256(path, name)
    if isinstance(opened, Problem):
        dataset.report.add(to_finding(opened, name))
        return dataset
    _Scan(dataset, opened).run(on_progress)
    return dataset


class _Scan:
    """The one pass over a file."""

    def __init__(self, dataset: Dataset, container: Container) -> None:
        self._dataset, self._container = dataset, container
        self._unused: dict[str, tuple[RawRow, int]] = {}
        self._first_of_shape: dict[str, RawRow] = {}
        self._untrainable = 0

    def run(self, on_progress: OnProgress | None) -> None:
        """Examine every row, then the file as a whole."""
        total, reported = self._dataset.path.stat().st_size, 0
        rowwise = self._container.kind == "parquet"
        for raw in self._container.rows():
            self._take(raw, self._dataset.examiner.examine(raw))
            if on_progress and not rowwise and raw.position - reported >= _PROGRESS_BYTES:
                reported = raw.position
                on_progress(Progress("read data", reported, total, "bytes"))
        if on_progress:
            on_progress(Progress("read data", total, total, "bytes"))
        self._examine_file()

    def _take(self, raw: RawRow, row: Examined) -> None:
        dataset = self._dataset
        if raw.problem is None or raw.data is not None or raw.value is not None:
            dataset.row_count += 1
        for problem in row.problems:
            self._report(problem, raw)
            self._untrainable += problem.code == "no_trainable_token"
        for key in row.unused:
            first, count = self._unused.get(key, (None, 0))
            if first or len(self._unused) < _UNUSED_KEYS:
                self._unused[key] = (first or _light(raw), count + 1)
        if not row.digest:
            return
        dataset.positions.append(raw.position)
        dataset.lines.append(raw.line)
        dataset.digests += row.digest
        dataset.shapes[row.shape] += 1
        if row.shape not in self._first_of_shape:
            self._first_of_shape[row.shape] = _light(raw)

    def _report(self, problem: Problem, raw: RawRow | None) -> None:
        report = self._dataset.report
        severity = problem.severity or CHECKS[problem.code].severity
        if not report.wants(problem.code, severity):
            report.count(problem.code, severity)
            return
        if raw is not None and isinstance(self._container, Table):
            raw = self._container.at_cell(raw, problem.path)
        report.add(to_finding(problem, self._dataset.name, raw))

    def _examine_file(self) -> None:
        dataset = self._dataset
        if not dataset.row_count and not dataset.report.has_errors:
            self._report(Problem("empty_file", "no rows"), None)
        elif not dataset.report.has_errors and dataset.row_count < _FEW_ROWS:
            self._report(Problem("few_rows", f"{dataset.row_count} rows"), None)
        if self._untrainable and self._untrainable == len(dataset):
            found = f"no row of {len(dataset)} trains anything"
            self._report(Problem("no_trainable_token", found, severity="error"), None)
        self._examine_columns()
        for row, earlier in repeats(dataset.digests):
            self._report_repeat(row, earlier)

    def _examine_columns(self) -> None:
        for key, (raw, count) in self._unused.items():
            fix = CHECKS["unused_column"].fix.format(key=key)
            found = f"column '{key}' is not used ({count:,} rows have it)"
            self._report(Problem("unused_column", found, path=(key,), fix=fix), raw)
        for shape in list(self._first_of_shape)[1:]:
            first = next(iter(self._first_of_shape))
            found = f"{self._dataset.shapes[shape]:,} rows are {shape}, the first row is {first}"
            self._report(Problem("mixed_shapes", found), self._first_of_shape[shape])

    def _report_repeat(self, row: int, earlier: int) -> None:
        dataset = self._dataset
        place = RawRow(row, dataset.lines[row], dataset.positions[row])
        self._report(Problem("duplicate_row", f"the same as line {dataset.lines[earlier]}"), place)


def to_finding(problem: Problem, name: str, raw: RawRow | None = None) -> Finding:
    """Give a problem its place in the file."""
    check = CHECKS[problem.code]
    severity = problem.severity or check.severity
    fix, found = problem.fix or check.fix, problem.found
    if raw is None:
        return Finding(problem.code, severity, name, 0, 0, json_path(problem.path), found, fix)
    line, column = raw.line, raw.column
    if raw.data is not None:
        offset = problem.offset if problem.offset is not None else find_value(raw.data, problem.path)
        line, column = line_and_column(raw.data, offset, line=line, column=column)
        if problem.offset is not None:
            found += f" (byte offset {raw.position + offset:,})"
    return Finding(problem.code, severity, name, line, column, json_path(problem.path), found, fix, raw.index)


def _light(raw: RawRow) -> RawRow:
    """A row kept for a later finding, without more of its content than a place needs."""
    return RawRow(raw.index, raw.line, raw.position, raw.data, None, raw.column)


def _sha256(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataError(f"'{name}' is gone", hint="put the file back as it was") from error


def _changed(name: str) -> DataError:
    return DataError(
        f"'{name}' changed while it was in use", hint="start again, or put the file back as it was"
    )
