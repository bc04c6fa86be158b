"""From a place in a parsed row back to a place in the file.

Parsed JSON has lost its positions. Instead of a slow parser that keeps them for every row, the few rows
with a finding are scanned again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

__all__ = ["MAX_DEPTH", "find_value", "line_and_column", "nested_deeper", "repeated_keys"]

MAX_DEPTH = 64
"""Deepest nesting of arrays and objects a row may have; real rows need fewer than ten."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^\s,\]}]++")
_EVENT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)


def find_value(raw: bytes, path: tuple[str | int, ...]) -> int:
    """Return the byte offset of the value at ``path``, or of its nearest ancestor that exists.

    Example:
        >>> raw = b'{"messages": [{"role": "bot"}]}'
        >>> raw[find_value(raw, ("messages", 0, "role")):]
        b'"bot"}]}'
    """
    at = _space(raw, 0)
    for step in path:
        inside = next((start for key, start in _children(raw, at) if key == step), None)
        if inside is None:
            return at
        at = inside
    return at


def repeated_keys(raw: bytes) -> Iterator[tuple[tuple[str | int, ...], str, int]]:
    """Yield (path of the object, key, byte offset of the repeated value) for every key given twice."""
    pending: list[tuple[tuple[str | int, ...], int]] = [((), _space(raw, 0))]
    while pending:
        path, at = pending.pop()
        seen: Counter[str | int] = Counter()
        for key, start in _children(raw, at):
            seen[key] += 1
            if seen[key] == 2:
                yield path, str(key), start
            if raw[start : start + 1] in b"{[":
                pending.append(((*path, key), start))


def nested_deeper(raw: bytes, limit: int) -> int | None:
    """Return the byte offset where arrays and objects first nest deeper than ``limit``, or None.

    Example:
        >>> nested_deeper(b'{"a": [[1], 2]}', 2), nested_deeper(b'{"a": "[[[["}', 2)
        (7, None)
    """
    depth = 0
    for event in _EVENT.finditer(raw):
        mark = event.group()
        if mark in b"[{":
            depth += 1
            if depth > limit:
                return event.start()
        elif mark in b"]}":
            depth -= 1
    return None


def line_and_column(raw: bytes, offset: int, *, line: int, column: int) -> tuple[int, int]:
    r"""Turn a byte offset inside a row that starts at ``line:column`` into a line and column of the file.

    Example:
        >>> line_and_column('{"é":\n 1}'.encode(), 8, line=7, column=1)
        (8, 2)
    """
    before = raw[:offset]
    newlines = before.count(b"\n")
    last = before.rfind(b"\n") + 1
    width = len(before[last:].decode("utf-8", "replace"))
    return line + newlines, width + (1 if newlines else column)


def _children(raw: bytes, at: int) -> Iterator[tuple[str | int, int]]:
    """Yield (key or index, byte offset of the value) of the object or array that starts at ``at``."""
    opener = raw[at : at + 1]
    if opener not in (b"{", b"["):
        return
    at, index = _space(raw, at + 1), 0
    while at < len(raw) and raw[at] not in b"]}":
        key: str | int = index
        if opener == b"{":
            quoted = _STRING.match(raw, at)
            if quoted is None:
                return
            key = json.loads(quoted.group())
            at = _space(raw, _space(raw, quoted.end()) + 1)
        yield key, at
        at = _space(raw, _skip(raw, at))
        at = _space(raw, at + 1) if raw[at : at + 1] == b"," else at
        index += 1


def _skip(raw: bytes, at: int) -> int:
    """Return the offset just after the value that starts at ``at``."""
    if raw[at : at + 1] not in (b"{", b"["):
        match = (_STRING if raw[at : at + 1] == b'"' else _SCALAR).match(raw, at)
        return match.end() if match else len(raw)
    depth = 0
    for event in _EVENT.finditer(raw, at):
        mark = event.group()
        depth += (mark in b"[{") - (mark in b"]}")
        if depth == 0:
            return event.end()
    return len(raw)


def _space(raw: bytes, at: int) -> int:
    match = _SPACE.match(raw, at)
    return match.end() if match else at
