"""From the bytes of a row to its conversation, with every check on the way.

A clean row in OpenAI's form is recognised by a short path that runs no check; a test holds that no check
would have fired on what it lets through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import orjson

from addenda.data.checks import CHECKS, encoding, syntax
from addenda.data.locate import MAX_DEPTH
from addenda.data.problem import Problem
from addenda.data.raw import RawRow
from addenda.data.rows import Conversation, Message, RowRef, messages_digest
from addenda.data.shapes import SHAPES, build, matching

__all__ = ["Examined", "Examiner", "is_error", "parse", "plain_messages"]

_KEY = re.compile(rb'"[ \t\r\n]*:')
_DIAGNOSES = (
    encoding.NulCharacter,
    encoding.InvalidUtf8,
    syntax.NestedTooDeep,
    syntax.NonFiniteNumber,
    encoding.LoneSurrogate,
    syntax.InvalidJson,
)
_MOST_PROBLEMS = 20
"""Places of one kind that are named in one row; a row of a million faults is not worth a million findings."""
_RECORD_CHECKS = [check for check in CHECKS.values() if check.stage == "record"]
_TURN_CHECKS = [check for check in CHECKS.values() if check.stage == "turns"]


@dataclass(slots=True)
class Examined:
    """What a row turned out to be."""

    shape: str = ""
    problems: list[Problem] = field(default_factory=list)
    digest: bytes = b""
    """16 bytes; empty where the row has errors."""
    unused: tuple[str, ...] = ()
    """Keys of the row that nothing reads."""
    conversation: Conversation | None = None
    """Only where it was asked for, and the row has no errors."""


@dataclass(frozen=True)
class Examiner:
    """Runs the checks of single rows.

    Args:
        shape: the shape every row must have; None finds it out row by row.
        columns: which of the file's columns stands for which key of a shape, as in
            ``{"prompt": "question", "completion": "answer"}``; other columns are then not read.
    """

    shape: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def examine(self, raw: RawRow, ref: RowRef | None = None) -> Examined:
        """Check one row; with a ``ref``, also make its conversation."""
        if raw.problem is not None:
            return Examined(problems=[raw.problem])
        value: Any = raw.value
        if raw.data is not None:
            value, problems = parse(raw.data)
            if problems:
                return Examined(problems=problems)
        record = self._renamed(value) if self.columns else value
        messages = plain_messages(record)
        if messages is not None and self.shape in (None, _PLAIN_SHAPE[len(record)]):
            return _plain(messages, _PLAIN_SHAPE[len(record)], ref)
        return self._examine_value(value, ref or RowRef("", raw.line, raw.index), keep=ref is not None)

    def _examine_value(self, value: Any, ref: RowRef, *, keep: bool) -> Examined:
        record, problems = self._mapped(value)
        problems = problems or self._record_problems(record)
        if problems:
            return Examined(problems=problems)
        shape = SHAPES[self.shape or matching(record)[0]]
        turns, problems = shape.turns(record)
        if not problems and shape.name != "text":
            problems = [
                problem for check in _TURN_CHECKS for problem in islice(check.find(turns), _MOST_PROBLEMS)
            ]
        out = Examined(shape.name, [self._unmapped(problem) for problem in problems])
        out.unused = tuple(
            key for key in value if key not in self._read_keys(shape.required | shape.optional)
        )
        if not any(is_error(problem) for problem in problems):
            conversation = build(shape.name, record, turns, ref)
            out.digest = conversation.digest
            out.conversation = conversation if keep else None
        return out

    def _record_problems(self, record: Any) -> list[Problem]:
        if self.shape and isinstance(record, dict):
            missing = sorted(SHAPES[self.shape].required - set(record))
            found = (
                f"no {' and no '.join(repr(key) for key in missing)}, which the shape '{self.shape}' needs"
            )
            return [Problem("missing_messages_list", found)] if missing else []
        return [problem for check in _RECORD_CHECKS for problem in check.find(record)]

    def _renamed(self, value: Any) -> Any:
        """A row under the names of its columns, or None where a column is missing or not used."""
        if type(value) is not dict or len(value) != len(self.columns):
            return None
        return {key: value.get(column) for key, column in self.columns.items()}

    def _mapped(self, value: Any) -> tuple[Any, list[Problem]]:
        """Rename the columns the user named."""
        if not self.columns or not isinstance(value, dict):
            return value, []
        absent = [column for column in self.columns.values() if column not in value]
        if absent:
            there = ", ".join(f"'{key}'" for key in list(value)[:12]) or "none"
            found = f"no column '{absent[0]}'; columns found: {there}"
            return value, [
                Problem("missing_messages_list", found, fix="name a column that exists in every row")
            ]
        return {key: value[column] for key, column in self.columns.items()}, []

    def _unmapped(self, problem: Problem) -> Problem:
        """Give a path back the column name that stands in the file."""
        if not problem.path or problem.path[0] not in self.columns:
            return problem
        return replace(problem, path=(self.columns[str(problem.path[0])], *problem.path[1:]))

    def _read_keys(self, keys: frozenset[str]) -> frozenset[str]:
        return frozenset(self.columns.values()) if self.columns else keys


def parse(raw: bytes) -> tuple[Any, list[Problem]]:
    """Parse one JSON row, and find what is wrong with its text."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        for check in _DIAGNOSES:
            problems = list(islice(check.find(raw), _MOST_PROBLEMS))
            if problems:
                return None, problems
        raise AssertionError(f"a row that does not parse has no diagnosis: {raw[:200]!r}") from None
    problems = list(encoding.NulCharacter.find(raw)) if b"\\u0000" in raw else []
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        problems += syntax.NestedTooDeep.find(raw)
    # The text cannot have fewer `"key":` than the row has keys; more means a repeated key, or such text in a string.
    if len(_KEY.findall(raw)) != _count_keys([value]) and not problems:
        problems += islice(syntax.DuplicateKey.find(raw), _MOST_PROBLEMS)
    return value, problems


def _count_keys(value: Any) -> int:
    """How many keys all objects inside a list or an object have together, its own too."""
    count = 0
    if type(value) is dict:
        count, value = len(value), value.values()
    for item in value:
        kind = type(item)
        if kind is dict or kind is list:
            count += _count_keys(item)
    return count


def plain_messages(value: Any) -> list[dict[str, str]] | None:
    """Return the messages of a row in which no check can fire, or None where they have to be run.

    Such a row is messages alone (a system message at most first, then user and assistant by turns, text in each),
    or a prompt and a completion, both text.
    """
    if type(value) is not dict:
        return None
    if len(value) == 1:
        messages = value.get("messages")
        return messages if type(messages) is list and _is_plain_chat(messages) else None
    texts: tuple[Any, Any] = value.get("prompt"), value.get("completion")
    if len(value) != 2 or not all(type(text) is str and text and not text.isspace() for text in texts):
        return None
    return [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]


_PLAIN_SHAPE = {1: "chat", 2: "prompt-completion"}
"""The shape of a plain row by the number of its keys."""


def _is_plain_chat(messages: list[Any]) -> bool:
    before = ""
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        content, role = message.get("content"), message.get("role")
        if type(content) is not str or not content or content.isspace():
            return False
        if role == "assistant":
            if before != "user":
                return False
        elif role == "user":
            if before == "user":
                return False
        elif role != "system" or before:
            return False
        before = role
    return before == "assistant" or any(message["role"] == "assistant" for message in messages)


def is_error(problem: Problem) -> bool:
    """Whether a problem keeps a run from starting."""
    return (problem.severity or CHECKS[problem.code].severity) == "error"


def _plain(messages: list[dict[str, str]], shape: str, ref: RowRef | None) -> Examined:
    out = Examined(shape, digest=messages_digest(messages))
    if ref is not None:
        turns = tuple(Message(message["role"], message["content"]) for message in messages)
        out.conversation = Conversation(turns, ref, shape=shape)
    return out
