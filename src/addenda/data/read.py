"""read_dataset: a file, a folder or standard input becomes a checked data set."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from addenda.core.progress import OnProgress
from addenda.data.dataset import Dataset, read_file, to_finding
from addenda.data.duplicates import shared
from addenda.data.examine import Examiner
from addenda.data.problem import Problem
from addenda.data.raw import DEFAULT_ROW_LIMIT
from addenda.data.shapes import MAPPABLE, SHAPES
from addenda.data.source import SUFFIXES
from addenda.errors import ConfigError, DataError, NotFoundError, nearest

__all__ = ["read_dataset"]

_SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}


def read_dataset(
    path: str | Path,
    *,
    valid: str | Path | None = None,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    row_limit: int = DEFAULT_ROW_LIMIT,
    stdin: BinaryIO | None = None,
    on_progress: OnProgress | None = None,
) -> Dataset:
    r"""Read and check training data; faults of rows are collected in the data set's report, not raised.

    Args:
        path: a file (JSON lines, JSON array, CSV, TSV, parquet), a folder with train, valid and test files,
            or ``-`` for standard input.
        valid: a file of validation rows; overrides the one a folder brings.
        shape: the shape of every row (chat, sharegpt, alpaca, prompt-completion, vertex, text); None finds it out.
        columns: which column stands for which key, as in ``{"prompt": "question", "completion": "answer"}``.
        row_limit: longest row that is read, in bytes, at least 1.
        stdin: what to read for ``-``; None is the process's standard input.
        on_progress: told how many bytes were read.

    Raises:
        NotFoundError: there is no such file, or a folder holds no data file.
        ConfigError: ``shape`` or ``columns`` names something that does not exist.
        DataError: a folder holds several files for one split.

    Example:
        >>> import io
        >>> rows = b'{"prompt": "1 + 1", "completion": "2"}\n' * 12
        >>> data = read_dataset("-", stdin=io.BytesIO(rows))
        >>> data.detected
        'jsonl, prompt-completion, 12 rows, utf-8'
        >>> data.conversations[3].messages[1].content, data.report.counts
        ('2', {'duplicate_row': 11})
    """
    examiner = Examiner(shape, dict(columns or {}))
    _check_settings(examiner, row_limit)
    read = _Reader(examiner, row_limit, on_progress)
    if str(path) == "-":
        dataset = read.stream(stdin or sys.stdin.buffer)
    elif Path(path).is_dir():
        dataset = read.folder(Path(path))
    else:
        dataset = read.file(Path(path))
    if valid is not None:
        dataset.valid = read.file(Path(valid))
    for part in (dataset.valid, dataset.test):
        if part is not None:
            _compare(dataset, part)
    return dataset


class _Reader:
    """The settings that are the same for every file of one data set."""

    def __init__(self, examiner: Examiner, row_limit: int, on_progress: OnProgress | None) -> None:
        self._examiner, self._row_limit, self._on_progress = examiner, row_limit, on_progress

    def file(self, path: Path, name: str = "") -> Dataset:
        """Read one file."""
        if not path.is_file():
            near = (
                nearest(path.name, (other.name for other in path.parent.glob("*")))
                if path.parent.is_dir()
                else []
            )
            hint = f"did you mean '{near[0]}'?" if near else "give a file, a folder, or - for standard input"
            raise NotFoundError(f"there is no data file '{path}'", hint=hint)
        return read_file(
            path,
            name or str(path),
            examiner=self._examiner,
            row_limit=self._row_limit,
            on_progress=self._on_progress,
        )

    def stream(self, stdin: BinaryIO) -> Dataset:
        """Write a stream to a temporary file, so that it can be read twice; the file goes with the data set."""
        folder = tempfile.TemporaryDirectory(prefix="addenda-stdin-")
        path = Path(folder.name) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(stdin, file, 1 << 20)
        dataset = self.file(path, "<stdin>")
        weakref.finalize(dataset, folder.cleanup)
        return dataset

    def folder(self, folder: Path) -> Dataset:
        """Read the train, valid and test files of a folder; one file alone is the training file."""
        files = sorted(
            path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        parts = {split: _one(folder, files, names) for split, names in _SPLITS.items()}
        train = parts["train"] or (files[0] if len(files) == 1 else None)
        if train is None:
            there = ", ".join(path.name for path in files[:8]) or "none"
            raise NotFoundError(
                f"the folder '{folder}' holds no training file",
                where={"data files": there, "looked for": "train" + ", train".join(SUFFIXES)},
                hint="name one file train.jsonl, or give the file itself",
            )
        dataset = self.file(train)
        dataset.valid = self.file(parts["valid"]) if parts["valid"] else None
        dataset.test = self.file(parts["test"]) if parts["test"] and parts["test"] != train else None
        return dataset


def _one(folder: Path, files: list[Path], names: tuple[str, ...]) -> Path | None:
    """The one file of a split; parquet shards are named like ``train-00000-of-00001``."""
    fitting = [path for path in files if path.stem.lower().split("-0")[0] in names]
    if len(fitting) > 1:
        there = ", ".join(path.name for path in fitting)
        raise DataError(
            f"the folder '{folder}' holds several {names[0]} files: {there}", hint="keep one of them"
        )
    return fitting[0] if fitting else None


def _compare(train: Dataset, valid: Dataset) -> None:
    """Report validation or test rows that are trained on."""
    both = shared(train.digests, valid.digests)
    if both:
        first = valid.conversations[both[0]]
        found = (
            f"{len(both):,} of {len(valid):,} rows are in '{train.name}' too; the first is row {both[0] + 1}"
        )
        if first.messages:
            found += f", '{first.messages[-1].content[:40]}'"
        valid.report.add(to_finding(Problem("train_valid_overlap", found), valid.name))


def _check_settings(examiner: Examiner, row_limit: int) -> None:
    if row_limit < 1:
        raise ConfigError(
            f"row_limit must be at least 1 byte, got {row_limit}", hint="the default is 1048576"
        )
    if examiner.shape is not None and examiner.shape not in SHAPES:
        near = nearest(examiner.shape, SHAPES)
        hint = f"did you mean '{near[0]}'?" if near else f"shapes are {', '.join(SHAPES)}"
        raise ConfigError(
            f"there is no data shape '{examiner.shape}'", where={"shapes": ", ".join(SHAPES)}, hint=hint
        )
    unknown = sorted(set(examiner.columns) - MAPPABLE)
    if unknown:
        raise ConfigError(
            f"no shape has a key '{unknown[0]}' a column could be mapped to",
            where={"keys": ", ".join(sorted(MAPPABLE))},
            hint="for instance --set data.prompt=question --set data.completion=answer",
        )
