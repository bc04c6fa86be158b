"""Checks of the JSON text of a row."""

from __future__ import annotations

import re
from collections.abc import Iterator

import orjson

from addenda.data.checks.base import Check, register
from addenda.data.locate import MAX_DEPTH, nested_deeper, repeated_keys
from addenda.data.problem import Problem

__all__ = ["DuplicateKey", "InvalidJson", "NestedTooDeep", "NonFiniteNumber", "RowTooLong"]

_GOOD = b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}\n'
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NON_FINITE = re.compile(rb"-?\b(?:NaN|Infinity|nan|inf)\b|-?\d+(?:\.\d+)?[eE]\+?\d{3,}")


@register
class RowTooLong(Check):
    """A row is longer than the row limit (1 MiB unless set otherwise).

    What it finds: a row over the limit, before it is parsed or held in memory.
    Why it matters: no model here can read a row of a million characters; it is nearly always a file without
    line ends, or a quote that was never closed.
    Example: a 20 MB line.
    What to do: split the row; a program may read longer ones with ``read_dataset(..., row_limit=...)``.
    """

    code, severity, stage = "row_too_long", "error", "bytes"
    fix = "split or shorten the row"
    bad = _GOOD.replace(b"Hi.", b"Hi. " * 300_000)
    good = _GOOD


@register
class NestedTooDeep(Check):
    """A row nests arrays and objects deeper than 64 levels.

    What it finds: the place where nesting goes beyond that.
    Why it matters: it exhausts the stack of recursive readers; no format of training data needs it.
    Example: ``[[[[...]]]]`` 5,000 deep.
    What to do: remove the row, or flatten the value.
    """

    code, severity, stage = "nested_too_deep", "error", "bytes"
    fix = "remove the row, or flatten the value"
    bad = b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"
    good = _GOOD

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
            return
        at = nested_deeper(raw, MAX_DEPTH)
        if at is not None:
            yield cls.problem(f"arrays and objects more than {MAX_DEPTH} deep", offset=at)


@register
class NonFiniteNumber(Check):
    """A number is NaN, infinite, or too large for a double.

    What it finds: ``NaN``, ``Infinity``, ``-Infinity`` and numbers like ``1e999``.
    Why it matters: JSON has no such values. Readers that accept them turn a weight into null or into infinity.
    Example: ``{"messages": [...], "weight": NaN}``, as Python's json writes it.
    What to do: write a finite number, or leave the key out.
    """

    code, severity, stage = "non_finite_number", "error", "bytes"
    fix = "write a finite number, or leave the key out"
    bad = _GOOD.replace(b'"Hello."', b'"Hello.", "weight": NaN')
    good = _GOOD.replace(b"Hello.", b"NaN and Infinity as words.")

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        blanked = _STRINGS.sub(lambda match: b'"' + b" " * (len(match.group()) - 2) + b'"', raw)
        for match in _NON_FINITE.finditer(blanked):
            value = match.group().decode()
            if value[-1].isdigit() and float(value) not in (float("inf"), float("-inf")):
                continue
            yield cls.problem(f"the number {value}", offset=match.start())


@register
class DuplicateKey(Check):
    """An object has the same key twice.

    What it finds: the second occurrence, with the path of its object.
    Why it matters: readers keep one of the two values, and which one differs between readers.
    Example: ``{"role": "user", "role": "assistant", "content": "Hi."}``.
    What to do: keep one of the two.
    """

    code, severity, stage = "duplicate_key", "error", "bytes"
    fix = "keep one of the two"
    bad = _GOOD.replace(b'"role": "user",', b'"role": "system", "role": "user",')
    good = _GOOD.replace(b"Hello.", b'He said \\"role\\": twice, \\"role\\":')

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        for path, key, offset in repeated_keys(raw):
            yield cls.problem(f"key '{key}' a second time", path=(*path, key), offset=offset)


@register
class InvalidJson(Check):
    """A row is not JSON.

    What it finds: the first place where a row stops being JSON.
    Why it matters: the row cannot be read at all.
    Example: a trailing comma, single quotes, a line that was cut off.
    What to do: repair the place named; if rows span several lines, write one row per line or a JSON array.
    """

    code, severity, stage = "invalid_json", "error", "bytes"
    fix = "repair the row; each line must be one complete JSON object"
    bad = _GOOD.replace(b'"Hello."}', b'"Hello.",}')
    good = b"[\n  " + _GOOD.strip() + b"\n]\n"

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        try:
            orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            text = raw.decode("utf-8", "replace")
            offset = len(text[: error.pos].encode("utf-8"))
            yield cls.problem(
                _reason(error.msg, text), offset=offset, fix=_remedy(error.msg, text, error.pos)
            )


def _reason(message: str, text: str) -> str:
    reason = message.split(": line ")[0].lower()
    return f"{reason}, row begins '{text[:30].strip()}'" if text[:1] != "{" else reason


def _remedy(message: str, text: str, at: int) -> str:
    """Name the cure for the usual causes; empty where none is recognised."""
    if "trailing comma" in message:
        return "remove the comma before the closing bracket"
    if text[at : at + 1] == "'":
        return 'write double quotes, as in {"text": "..."}'
    if text[at : at + 4] in ("None", "True") or text[at : at + 5] == "False":
        return "write null, true or false: this is Python's spelling"
    if "unexpected content" in message:
        return "write one object per line"
    if at >= len(text.rstrip()):
        return "the row ends too early: restore the rest of the line"
    return ""
