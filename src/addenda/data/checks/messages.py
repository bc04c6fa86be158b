"""Checks of single messages: keys, roles, contents, weights, tool calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from addenda.data.checks.base import Check, register
from addenda.data.embedded import parse_embedded
from addenda.data.problem import Problem, Turn
from addenda.data.shapes import describe
from addenda.errors import nearest

__all__ = [
    "ROLES",
    "InvalidToolCall",
    "InvalidWeight",
    "MessageMissingKey",
    "MessageUnrecognizedKey",
    "MissingContent",
    "UnrecognizedRole",
]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that are read; developer is read as system, and function as tool."""

_SYNONYMS = {
    "human": "user",
    "customer": "user",
    "bot": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_SYNONYMS |= {"ai": "assistant", "agent": "assistant", "chatbot": "assistant", "observation": "tool"}
_KEYS = ("role", "content", "weight", "name", "tool_calls", "tool_call_id", "function_call")
_REASONING = ("reasoning_content", "thinking")
_GOOD = b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}\n'
_CALL = b'{"type": "function", "function": {"name": "clock", "arguments": "{}"}}'
_WITH_CALL = (
    b'{"messages": [{"role": "user", "content": "The time?"}, {"role": "assistant", "tool_calls": ['
    + _CALL
    + b"]},"
    b' {"role": "tool", "content": "noon"}, {"role": "assistant", "content": "It is noon."}]}\n'
)


@register
class MessageMissingKey(Check):
    """A message has no role, or neither content nor tool calls.

    What it finds: a message without ``role``, or without ``content`` where nothing stands in for it.
    Why it matters: a chat template writes an empty turn for it, and the model learns to say nothing.
    Example: ``{"role": "assistant"}``.
    What to do: add the key.
    """

    code, severity, stage = "message_missing_key", "error", "turns"
    fix = 'add the key: a message is {"role": "...", "content": "..."}'
    bad = _GOOD.replace(b'"role": "user", ', b"")
    good = _WITH_CALL

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for turn in turns:
            missing = [key for key in ("role", "content") if key not in turn.fields]
            if _calls(turn):
                missing = [key for key in missing if key != "content"]
            for key in missing:
                there = ", ".join(f"'{name}'" for name in turn.fields) or "none"
                yield cls.problem(f"a message without '{key}'; keys found: {there}", path=turn.path)


@register
class MessageUnrecognizedKey(Check):
    """A message has a key that nothing reads.

    What it finds: a key other than role, content, weight, name, tool_calls, tool_call_id, function_call,
    reasoning_content and thinking. A key that looks like one of them misspelt is an error, any other a warning.
    Why it matters: a misspelt ``weight`` would train on an answer that was meant to be left out.
    Example: ``{"role": "assistant", "content": "Hello.", "wieght": 0}``.
    What to do: correct the spelling; remove keys that are not needed.
    """

    code, severity, stage = "message_unrecognized_key", "warning", "turns"
    fix = "nothing reads it: remove it if it should have an effect"
    bad = _GOOD.replace(b'"Hello."', b'"Hello.", "wieght": 0')
    good = _GOOD.replace(b'"Hello."', b'"Hello.", "weight": 1')

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for turn in turns:
            for key in turn.fields:
                if key not in _KEYS and key not in _REASONING:
                    yield cls._unknown(turn, key)

    @classmethod
    def _unknown(cls, turn: Turn, key: str) -> Problem:
        close = [name for name in nearest(key, _KEYS, count=1) if name not in turn.fields]
        if not close:
            return cls.problem(f"key '{key}'", path=turn.at(key))
        fix = f"did you mean '{close[0]}'?"
        return cls.problem(f"key '{key}'", path=turn.at(key), severity="error", fix=fix)


@register
class UnrecognizedRole(Check):
    """A message has a role that no chat format knows.

    What it finds: a role other than system, developer, user, assistant, tool and function.
    Why it matters: templates drop such a message, or fail, or train on the wrong side of the conversation.
    Example: ``"role": "bot"``.
    What to do: write the role this format knows.
    """

    code, severity, stage = "unrecognized_role", "error", "turns"
    fix = "roles are system, user, assistant and tool"
    bad = _GOOD.replace(b'"assistant"', b'"bot"')
    good = _GOOD

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for turn in turns:
            role = turn.fields.get("role", "user")
            if isinstance(role, str) and role in ROLES:
                continue
            yield cls.problem(f"role {describe(role)}", path=turn.at("role"), fix=_role_fix(role))


@register
class MissingContent(Check):
    """A message has no text where text belongs.

    What it finds: content that is null, empty, only white space, or not text (a number, an object, an image).
    Why it matters: an empty answer teaches the model to stop at once; a number is silently turned into a string.
    Example: ``{"role": "assistant", "content": null}`` without tool calls.
    What to do: write the text, or remove the row.
    """

    code, severity, stage = "missing_content", "error", "turns"
    fix = "write the text, or remove the row"
    bad = _GOOD.replace(b'"Hello."', b"null")
    good = _WITH_CALL

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for turn in turns:
            if "content" not in turn.fields:
                continue
            content = turn.fields["content"]
            may_be_empty = bool(_calls(turn)) or turn.fields.get("role") in ("tool", "function")
            if isinstance(content, str) and (may_be_empty or (content and not content.isspace())):
                continue
            if content is None and may_be_empty:
                continue
            yield cls.problem(_content_found(content), path=turn.at("content"))


@register
class InvalidWeight(Check):
    """A message has a weight other than 0 and 1.

    What it finds: a ``weight`` that is not 0, 1, true or false.
    Why it matters: a weight says whether a message is trained on; fractions are not supported, and rounding
    one would change what is learned.
    Example: ``"weight": 0.5``.
    What to do: write 0 (context only) or 1 (trained on).
    """

    code, severity, stage = "invalid_weight", "error", "turns"
    fix = "write 0 (context only) or 1 (trained on)"
    bad = _GOOD.replace(b'"Hello."', b'"Hello.", "weight": 0.5')
    good = _GOOD.replace(b'"Hello."', b'"Hello.", "weight": 1')

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for turn in turns:
            weight = turn.fields.get("weight", 1)
            if not isinstance(weight, int | float) or weight not in (0, 1):
                yield cls.problem(f"weight {describe(weight)}", path=turn.at("weight"))


@register
class InvalidToolCall(Check):
    """A tool call has no function name, or its arguments are not a JSON object.

    What it finds: ``tool_calls`` that are no list of ``{"function": {"name", "arguments"}}``, and arguments
    that cannot be read.
    Why it matters: the model would learn to write calls that no program can run.
    Example: ``"arguments": "{city: Bonn}"``.
    What to do: write the arguments as JSON, or as an object.
    """

    code, severity, stage = "invalid_tool_call", "error", "turns"
    fix = 'write {"type": "function", "function": {"name": "...", "arguments": {...}}}'
    bad = _WITH_CALL.replace(b'"arguments": "{}"', b'"arguments": "{city: Bonn}"')
    good = _WITH_CALL

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for turn in turns:
            calls = _calls(turn)
            if not calls:
                continue
            wrong = _call_fault(calls)
            if wrong:
                name = "tool_calls" if turn.fields.get("tool_calls") else "function_call"
                yield cls.problem(wrong, path=turn.at(name))


def _calls(turn: Turn) -> object:
    """The tool calls of a turn in either spelling, as they stand in the row."""
    single = turn.fields.get("function_call")
    return turn.fields.get("tool_calls") or ([{"function": single}] if single else None)


def _call_fault(calls: object) -> str:
    """Say what is wrong with the calls of one message; empty where nothing is."""
    if not isinstance(calls, list):
        return f"{describe(calls)} where a list of calls belongs"
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "a call without a function name"
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_embedded(arguments)
            except ValueError:
                return f"arguments of '{function['name']}' are not JSON"
        if not isinstance(arguments, dict):
            return f"arguments of '{function['name']}' are not an object"
    return ""


def _role_fix(role: object) -> str:
    name = role.strip().lower() if isinstance(role, str) else ""
    close = _SYNONYMS.get(name) or next(iter(nearest(name, ROLES, count=1)), "")
    return f"did you mean '{close}'?" if close else ""


def _content_found(content: object) -> str:
    if isinstance(content, str):
        return "an empty string" if not content else "only white space"
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        other = next((kind for kind in kinds if kind != "text"), None)
        return f"a content part of type '{other}'; only text is read" if other else "an empty list of parts"
    return f"{describe(content)} where text belongs"
