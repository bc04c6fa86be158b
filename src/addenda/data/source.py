"""Which format a file has: told by its content first, by its name where the content leaves it open."""

from __future__ import annotations

from pathlib import Path

import orjson

from addenda.data.jsonarray import JsonArray, Member, object_members
from addenda.data.jsonl import JsonLines
from addenda.data.parquet import Parquet
from addenda.data.problem import Problem
from addenda.data.raw import Container
from addenda.data.shapes import MAPPABLE, matching
from addenda.data.table import Table

__all__ = ["SUFFIXES", "open_container"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files that are looked for in a folder."""

_WIDE_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32 (little-endian)"),
    (b"\x00\x00\xfe\xff", "UTF-32 (big-endian)"),
    (b"\xff\xfe", "UTF-16 (little-endian)"),
    (b"\xfe\xff", "UTF-16 (big-endian)"),
)
_PACKED_MARKS = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"(\xb5/\xfd", "zstandard"),
    (b"BZh", "bzip2"),
)
_UTF8_MARK = b"\xef\xbb\xbf"


def open_container(path: Path, *, suffix: str, row_limit: int) -> Container | Problem:
    """Find the reader for a file, or say why there is none.

    Args:
        path: the file.
        suffix: ending of the name the user gave, with its dot; empty for standard input.
        row_limit: longest row that is read, in bytes.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if head[:4] == b"PAR1" or suffix == ".parquet":
        return Parquet(path, row_limit)
    wrong = _wide_encoding(head) or _packed(head)
    if wrong:
        return wrong
    start = len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0
    notes = ("utf-8 with BOM" if start else "utf-8",) + (("CRLF",) if b"\r\n" in head else ())
    first = head[start:].lstrip()[:1]
    if first in (b"{", b"[") and (suffix not in (".csv", ".tsv") or _is_json_line(head[start:])):
        return _json(path, start, suffix, row_limit=row_limit, notes=notes)
    return _text(path, head[start:], start, suffix=suffix, row_limit=row_limit, notes=notes)


def _is_json_line(head: bytes) -> bool:
    """Whether the first line is JSON: a file named like a table that no table can be."""
    try:
        return isinstance(orjson.loads(head.split(b"\n", 1)[0]), dict | list)
    except orjson.JSONDecodeError:
        return False


def _wide_encoding(head: bytes) -> Problem | None:
    fix = "iconv -f {} -t UTF-8 IN > OUT"
    for mark, name in _WIDE_MARKS:
        if head.startswith(mark):
            return Problem("wrong_encoding", f"the file is {name}", fix=fix.format(name.split()[0]))
    pairs = min(len(head), 512) // 2
    for parity, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if pairs >= 4 and head[parity : pairs * 2 : 2].count(0) > pairs * 0.7:
            return Problem(
                "wrong_encoding", f"the file looks like {name} without its mark", fix=fix.format(name)
            )
    return None


def _packed(head: bytes) -> Problem | None:
    for mark, name in _PACKED_MARKS:
        if head.startswith(mark):
            return Problem("unreadable_file", f"the file is compressed ({name})", fix="unpack it first")
    return None


def _text(
    path: Path, head: bytes, start: int, *, suffix: str, row_limit: int, notes: tuple[str, ...]
) -> Container | Problem:
    """A file that does not begin like JSON: a table, or broken JSON lines."""
    line = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    separator = "\t" if suffix == ".tsv" else max(",;\t", key=line.count)
    names = {name.strip().strip('"') for name in line.split(separator)}
    if suffix in (".csv", ".tsv") or (names & MAPPABLE and line.count(separator)):
        if separator not in (",", "\t"):
            notes = (*notes, f"separated by '{separator}'")
        kind = "tsv" if separator == "\t" else "csv"
        return Table(path, start, row_limit, separator, notes=notes, kind=kind)
    if suffix in (".jsonl", ".ndjson", ".json", "") or not head.strip():
        return JsonLines(path, start, row_limit, notes=notes)
    found = f"a file named '*{suffix}' that begins '{line[:40]}'"
    return Problem("unreadable_file", found)


def _json(
    path: Path, start: int, suffix: str, *, row_limit: int, notes: tuple[str, ...]
) -> Container | Problem:
    """Tell JSON lines, an array, an object around an array, and a single row apart."""
    with path.open("rb") as file:
        file.seek(start)
        line = b"\n"
        while line.isspace():
            line = file.readline(row_limit + 1)
        more = file.read(1 << 16).strip()
    lines = JsonLines(path, start, row_limit, notes=notes)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = None
    if value is not None and (more or (suffix in (".jsonl", ".ndjson") and isinstance(value, dict))):
        return lines
    if line.lstrip()[:1] == b"[":
        return JsonArray(path, start, row_limit, notes=notes)
    if value is None and suffix in (".jsonl", ".ndjson"):
        return lines
    members = object_members(path, start, row_limit)
    return lines if members is None else _from_object(path, start, members, row_limit=row_limit, notes=notes)


def _from_object(
    path: Path, start: int, members: list[Member], *, row_limit: int, notes: tuple[str, ...]
) -> Container | Problem:
    """One object fills the file: it is a row itself, or it holds the list of rows."""
    lists = [member for member in members if member.is_list]
    if matching(member.key for member in members) or not lists:
        return JsonArray(path, start, row_limit, notes=notes, kind="json", single=True)
    if len(lists) == 1:
        notes = (*notes, f"rows under '{lists[0].key}'")
        return JsonArray(path, lists[0].position, row_limit, notes=notes, enclosed=True)
    names = ", ".join(f"'{member.key}'" for member in lists[:8])
    fix = "write each list to a file of its own; a folder may hold train, valid and test files"
    return Problem("unreadable_file", f"an object with several lists: {names}", fix=fix)
