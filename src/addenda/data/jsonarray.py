"""A JSON array of rows, read one element at a time whatever the size of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from addenda.data.jsonl import too_long
from addenda.data.problem import Problem
from addenda.data.raw import RawRow

__all__ = ["ByteStream", "JsonArray", "Member", "Skimmer", "object_members"]

_CHUNK = 1 << 20
_MOST_MEMBERS = 1000
"""An object with more members than this is not looked at as a wrapper around a list of rows."""
# Passes over whole strings and everything else up to the next bracket, or to a string that goes on in the next piece.
_EVENT = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}"])', re.DOTALL)
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_REST_OF_SCALAR = re.compile(rb"[^\s,\[\]{}\"]*+")
_SPACE = re.compile(rb"[ \t\r\n]*+")


class Skimmer:
    """Finds where a JSON value ends, fed with pieces of any size.

    It looks only at quotes and brackets, so it holds nothing back and accepts wrong JSON; the value is
    parsed afterwards.

    Example:
        >>> skimmer = Skimmer()
        >>> skimmer.feed(b'{"a": "}', 0), skimmer.feed(b'"}, {', 0)
        (-1, 2)
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._in_scalar = False

    def feed(self, piece: bytes, at: int) -> int:
        """Return the index just after the value, or -1 where it goes on in the next piece."""
        if at >= len(piece):
            return -1
        if self._in_string:
            at = self._string(piece, at)
            if at < 0 or self._depth == 0:
                return at
        if self._depth == 0:
            first = piece[at : at + 1]
            if first == b'"' and not self._in_scalar:
                self._in_string = True
                return self._string(piece, at + 1)
            if self._in_scalar or first not in (b"{", b"["):
                return self._scalar(piece, at)
        return self._nested(piece, at)

    def _nested(self, piece: bytes, at: int) -> int:
        while event := _EVENT.match(piece, at):
            mark, at = event.group(1), event.end()
            if mark == b'"':
                self._in_string = True
                return self._string(piece, at)
            self._depth += 1 if mark in b"[{" else -1
            if self._depth == 0:
                return at
        return -1

    def _string(self, piece: bytes, at: int) -> int:
        """Go on inside a string; return the index after its closing quote, or -1."""
        if self._escaped and at < len(piece):
            at, self._escaped = at + 1, False
        match = _REST_OF_STRING.match(piece, at)
        end = match.end() if match else at
        if end >= len(piece) or piece[end : end + 1] == b"\\":
            self._escaped = end < len(piece)
            return -1
        self._in_string = False
        return end + 1

    def _scalar(self, piece: bytes, at: int) -> int:
        self._in_scalar = True
        match = _REST_OF_SCALAR.match(piece, at)
        end = match.end() if match else at
        return end if end < len(piece) else -1


class ByteStream:
    """A file read forward in pieces, which knows the line and column it stands at."""

    def __init__(self, file: BinaryIO, start: int, chunk: int = _CHUNK) -> None:
        file.seek(start)
        self._file, self._chunk = file, chunk
        self._piece, self._at, self._base = b"", 0, start
        self.line, self.column = 1, 1

    @property
    def position(self) -> int:
        """Byte offset in the file."""
        return self._base + self._at

    def peek(self) -> bytes:
        """Pass over white space and return the next byte; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._piece, self._at)
            self._advance(match.end() if match else self._at)
            if self._at < len(self._piece):
                return self._piece[self._at : self._at + 1]
            if not self._fill():
                return b""

    def step(self) -> None:
        """Pass over one byte."""
        self._advance(self._at + 1)

    def value(self, limit: int) -> tuple[bytes | None, int]:
        """Take one value: its bytes (None where they are more than ``limit``) and its length."""
        skimmer, parts, length = Skimmer(), list[bytes](), 0
        while True:
            end = skimmer.feed(self._piece, self._at)
            stop = end if end >= 0 else len(self._piece)
            length += stop - self._at
            if length <= limit:
                parts.append(self._piece[self._at : stop])
            else:
                parts.clear()
            self._advance(stop)
            if end >= 0 or not self._fill():
                return (b"".join(parts) if length <= limit else None), length

    def _fill(self) -> bool:
        piece = self._file.read(self._chunk)
        self._base += len(self._piece)
        self._piece, self._at = piece, 0
        return bool(piece)

    def _advance(self, to: int) -> None:
        passed = self._piece[self._at : to]
        newlines = passed.count(b"\n")
        if newlines:
            self.line += newlines
            self.column = 1
            passed = passed[passed.rfind(b"\n") + 1 :]
        self.column += len(passed.decode("utf-8", "replace"))
        self._at = to


@dataclass
class JsonArray:
    """Reader of an array of rows, or of one row that spans lines (``single``)."""

    path: Path
    start: int
    row_limit: int
    notes: tuple[str, ...] = ()
    kind: str = "json array"
    single: bool = False
    """The value at ``start`` is itself the only row."""
    enclosed: bool = False
    """The array is a member of an object, so something may follow it."""

    def rows(self) -> Iterator[RawRow]:
        """Yield the elements; where the array itself is wrong, the problem, and nothing after it."""
        with self.path.open("rb") as file:
            stream = ByteStream(file, self.start)
            stream.line = _line_of(self.path, self.start)
            stream.peek()
            if self.single:
                yield self._element(stream, 0)
                return
            stream.step()
            yield from self._elements(stream)

    def _elements(self, stream: ByteStream) -> Iterator[RawRow]:
        index, after_comma = 0, False
        while (mark := stream.peek()) not in (b"]", b""):
            if mark in b",}":
                yield self._broken(stream, index, f"'{mark.decode()}' where a row belongs")
                return
            yield self._element(stream, index)
            index += 1
            mark = stream.peek()
            after_comma = mark == b","
            if after_comma:
                stream.step()
            elif mark not in (b"]", b""):
                found = f"'{mark.decode('latin-1')}' after a row, where ',' or ']' belongs"
                yield self._broken(stream, index, found)
                return
        if mark == b"":
            yield self._broken(
                stream, index, "the file ends inside the array", "restore the rest of the file"
            )
        elif after_comma:
            yield self._broken(stream, index, "a comma after the last row", "remove the comma")
        stream.step()
        if mark == b"]" and not self.enclosed and stream.peek():
            yield self._broken(stream, index, "more text after the end of the array", "remove it")

    def _element(self, stream: ByteStream, index: int) -> RawRow:
        row = RawRow(index, stream.line, stream.position, column=stream.column)
        row.data, length = stream.value(self.row_limit)
        if row.data is None:
            row.problem = too_long(length, self.row_limit)
        return row

    def _broken(
        self, stream: ByteStream, index: int, found: str, fix: str = "repair the array here"
    ) -> RawRow:
        problem = Problem("invalid_json", f"{found}; nothing after it was read", fix=fix)
        return RawRow(index, stream.line, stream.position, column=stream.column, problem=problem)

    def read_at(self, position: int) -> RawRow:
        """Read one element again."""
        with self.path.open("rb") as file:
            data, _ = ByteStream(file, position, chunk=1 << 14).value(self.row_limit)
            return RawRow(-1, 0, position, data)


@dataclass(frozen=True)
class Member:
    """One member of a top-level object: its key, and where its value starts."""

    key: str
    position: int
    is_list: bool


def object_members(path: Path, start: int, limit: int) -> list[Member] | None:
    """List the members of the object that fills a file, without holding it; None where it is not one object."""
    members: list[Member] = []
    with path.open("rb") as file:
        stream = ByteStream(file, start)
        stream.peek()
        stream.step()
        while stream.peek() == b'"' and len(members) < _MOST_MEMBERS:
            name, _ = stream.value(limit)
            if name is None or stream.peek() != b":":
                return None
            stream.step()
            first = stream.peek()
            try:
                members.append(Member(orjson.loads(name), stream.position, first == b"["))
            except orjson.JSONDecodeError:
                return None
            stream.value(0)
            if stream.peek() == b",":
                stream.step()
        closed = stream.peek() == b"}"
        stream.step()
        return members if closed and not stream.peek() else None


def _line_of(path: Path, position: int) -> int:
    """The 1-based line a byte offset lies on."""
    lines = 1
    with path.open("rb") as file:
        while position > 0 and (piece := file.read(min(_CHUNK, position))):
            lines += piece.count(b"\n")
            position -= len(piece)
    return lines
