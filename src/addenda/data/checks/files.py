"""Checks of a whole file, and of two files against each other."""

from __future__ import annotations

from typing import ClassVar

from addenda.data.checks.base import Check, register

__all__ = [
    "DuplicateRow",
    "EmptyFile",
    "FewRows",
    "MalformedTable",
    "MixedShapes",
    "TrainValidOverlap",
    "UnreadableFile",
    "UnusedColumn",
]

_ROW = b'{"messages": [{"role": "user", "content": "Hi %d."}, {"role": "assistant", "content": "Hello."}]}\n'
_TEN = b"".join(_ROW % number for number in range(10))


@register
class EmptyFile(Check):
    """A file has no rows.

    What it finds: an empty file, an empty array, a table with only its header.
    Why it matters: training on nothing would succeed and change nothing.
    Example: an export that failed half-way.
    What to do: check the program that wrote the file.
    """

    code, severity, stage = "empty_file", "error", "file"
    fix = "check the program that wrote it; the file must hold at least one row"
    bad = b"\n\n"
    good = _TEN


@register
class FewRows(Check):
    """A file has fewer than ten rows.

    What it finds: one to nine rows.
    Why it matters: a held-out loss of so few rows says nothing, and the model may only learn them by heart.
    Example: a first try.
    What to do: add rows; ten is the least, some hundreds are usual.
    """

    code, severity, stage = "few_rows", "warning", "file"
    fix = "add rows; some hundreds are usual"
    bad = _ROW % 1
    good = _TEN


@register
class DuplicateRow(Check):
    """A row is there twice.

    What it finds: rows whose conversation equals an earlier one, whatever their spelling in the file.
    Why it matters: a repeated row counts twice in the loss. The held-out split keeps equal rows on one side.
    Example: two exports joined into one file.
    What to do: remove the copies, unless the weight is meant.
    """

    code, severity, stage = "duplicate_row", "warning", "file"
    fix = "remove the copies, unless they are meant to count more"
    bad = _TEN + _ROW % 3
    good = _TEN


@register
class TrainValidOverlap(Check):
    """Rows of the validation or test file are in the training file too.

    What it finds: conversations that both files hold.
    Why it matters: what is measured on them then is memory, not learning.
    Example: a split made after rows had been copied.
    What to do: remove them from one of the two files.
    """

    code, severity, stage = "train_valid_overlap", "warning", "file"
    fix = "remove these rows from one of the two files"
    bad: ClassVar = {"train.jsonl": _TEN, "valid.jsonl": _TEN[: len(_ROW % 1) * 3]}
    good: ClassVar = {"train.jsonl": _TEN, "valid.jsonl": _ROW % 11}


@register
class UnusedColumn(Check):
    """Rows have a key that is not used.

    What it finds: keys beside those of the row's shape, once for each key.
    Why it matters: a column that was meant to be learned, such as a label, would be left out silently.
    Example: ``text`` and ``category`` in one table: only the text is learned.
    What to do: nothing if the column is not needed; to learn it,
    ``--set data.prompt=text --set data.completion=category``.
    """

    code, severity, stage = "unused_column", "warning", "file"
    fix = "nothing if it is not needed; to learn it: --set data.prompt=COLUMN --set data.completion={key}"
    bad = b"".join(
        b'{"text": "I lost my card %d", "category": "lost_card"}\n' % number for number in range(10)
    )
    good = b"".join(b'{"text": "I lost my card %d"}\n' % number for number in range(10))


@register
class MixedShapes(Check):
    """A file holds rows of different shapes.

    What it finds: the first row whose shape is not that of the first row.
    Why it matters: usually two files were joined by mistake; all rows are read, each by its own shape.
    Example: chat rows followed by plain text.
    What to do: nothing if it is meant.
    """

    code, severity, stage = "mixed_shapes", "warning", "file"
    fix = "nothing to do if it is meant"
    bad = _TEN + b'{"text": "A page of text."}\n'
    good = _TEN


@register
class MalformedTable(Check):
    """A row of a table does not have the columns its header names.

    What it finds: a row with more or fewer fields than the header, a header that names a column twice, and a quote
    that is never closed.
    Why it matters: the fields of such a row are shifted, so answers land in other columns.
    Example: a comma inside a text that is not quoted.
    What to do: quote the fields, or export the table as JSON lines.
    """

    code, severity, stage = "malformed_table", "error", "file"
    fix = "quote fields that contain the separator, or export the table as JSON lines"
    bad = b"prompt,completion\nHi, there,Hello.\n"
    good = b'prompt,completion\n"Hi, there",Hello.\n'
    file_name = "data.csv"


@register
class UnreadableFile(Check):
    """A file is in no format that can be read, or it does not say which of its lists holds the rows.

    What it finds: an unknown kind of file; a JSON object with several lists.
    Why it matters: a guess could train on the wrong list.
    Example: ``{"train": [...], "test": [...]}`` in one file.
    What to do: write JSON lines, a JSON array, CSV, TSV or parquet; one list to a file.
    """

    code, severity, stage = "unreadable_file", "error", "file"
    fix = "write JSON lines, a JSON array, CSV, TSV or parquet; one list to a file"
    bad = b'{\n"train": [{"text": "a"}],\n"test": [{"text": "b"}]\n}\n'
    good = b'{\n"version": 1,\n"data": [{"text": "a"}]\n}\n'
    file_name = "data.json"
