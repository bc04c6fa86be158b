"""Checks of a parsed row: is it a row of training data, and of which shape."""

from __future__ import annotations

from collections.abc import Iterator

from addenda.data.checks.base import Check, register
from addenda.data.problem import Problem
from addenda.data.shapes import MAPPABLE, SHAPES, describe, matching, preference_keys
from addenda.errors import nearest

__all__ = ["AmbiguousFormat", "DataType", "MissingMessagesList", "PreferenceRow", "suggest_mapping"]

_GOOD = b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}\n'
_MOST_KEYS = 64
_QUESTIONS = ("question", "query", "input", "instruction", "prompt", "user", "context", "source")
_ANSWERS = (
    "answer",
    "long_answer",
    "response",
    "output",
    "completion",
    "target",
    "reply",
    "assistant",
    "label",
)


@register
class DataType(Check):
    """A row, or a part of it, is of the wrong JSON type.

    What it finds: a row that is not an object; a message that is not an object; tools or history that are no list.
    Why it matters: there is nothing to read in it.
    Example: a line that holds only a string, or ``"messages": ["Hi.", "Hello."]``.
    What to do: write each row as an object, and each message as ``{"role": ..., "content": ...}``.
    """

    code, severity, stage = "data_type", "error", "record"
    fix = 'write an object, as in {"role": "user", "content": "..."}'
    bad = b'"Hi."\n' + _GOOD
    good = _GOOD

    @classmethod
    def find(cls, value: object) -> Iterator[Problem]:
        if not isinstance(value, dict):
            fix = 'write each row as an object, as in {"messages": [...]}'
            yield cls.problem(f"{describe(value)} where a row belongs", fix=fix)


@register
class MissingMessagesList(Check):
    """A row has no messages list, and no other known shape either.

    What it finds: a row without the keys of any shape, or whose list of messages is missing or empty.
    Why it matters: readers that fill the gap with null train on nothing.
    Example: ``{"question": "...", "answer": "..."}``: a good row, in columns this format does not know.
    What to do: name the columns (``--set data.prompt=question --set data.completion=answer``), or write
    one of the known shapes.
    """

    code, severity, stage = "missing_messages_list", "error", "record"
    fix = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    bad = b'{"question": "Hi?", "answer": "Hello."}\n'
    good = _GOOD

    @classmethod
    def find(cls, value: object) -> Iterator[Problem]:
        if isinstance(value, dict) and not matching(value) and not preference_keys(value):
            keys = ", ".join(f"'{key}'" for key in list(value)[:12]) or "none"
            yield cls.problem(f"no known shape; keys found: {keys}", fix=suggest_mapping(list(value)))


@register
class AmbiguousFormat(Check):
    """A row fits two shapes at once.

    What it finds: a row with the keys of two shapes, such as ``messages`` and ``text``.
    Why it matters: the two say different things about what to learn, and a silent choice may be the wrong one.
    Example: the Alpaca files that carry a ready-made ``text`` beside ``instruction`` and ``output``.
    What to do: say which one counts with ``--set data.shape=...``, or remove the other's keys.
    """

    code, severity, stage = "ambiguous_format", "error", "record"
    fix = "say which shape counts, --set data.shape=NAME, or remove the other's keys"
    bad = _GOOD.replace(b"}]}", b'}], "text": "Hi. Hello."}')
    good = _GOOD

    @classmethod
    def find(cls, value: object) -> Iterator[Problem]:
        names = matching(value) if isinstance(value, dict) else []
        if len(names) > 1:
            fix = f"say which counts: {' or '.join(f'--set data.shape={name}' for name in names)}"
            second = sorted(SHAPES[names[1]].required)[0]
            yield cls.problem(f"keys of two shapes: {' and '.join(names)}", path=(second,), fix=fix)


@register
class PreferenceRow(Check):
    """A row holds a preference or a judgement, which this task does not train on.

    What it finds: ``chosen`` and ``rejected`` answers, OpenAI's ``preferred_output``, or ``prompt``,
    ``completion`` and ``label``.
    Why it matters: trained on as plain conversations, the rejected or badly judged answers would be learned too.
    Example: ``{"prompt": "...", "chosen": "...", "rejected": "..."}``.
    What to do: to learn the chosen answers only, map them: ``--set data.prompt=prompt --set data.completion=chosen``.
    """

    code, severity, stage = "preference_row", "error", "record"
    fix = "to learn the chosen answers only: --set data.prompt=prompt --set data.completion=chosen"
    bad = b'{"prompt": "Hi.", "chosen": "Hello.", "rejected": "What?"}\n'
    good = b'{"prompt": "Hi.", "completion": "Hello."}\n'

    @classmethod
    def find(cls, value: object) -> Iterator[Problem]:
        if not isinstance(value, dict) or not (marks := preference_keys(value)):
            return
        found = f"a preference row ({', '.join(marks)}); this task trains on one good answer a row"
        yield cls.problem(found, path=(marks[0],), fix=_preference_fix(marks, value))


def _preference_fix(marks: list[str], record: dict[str, object]) -> str:
    if "chosen" in marks and "prompt" in record:
        return ""
    if "label" in marks:
        return "keep the rows with good answers, and remove the judgement from them"
    return (
        f"to learn the good answers only, write each conversation with its {marks[0]} answer under 'messages'"
    )


def suggest_mapping(keys: list[str]) -> str:
    """Say how the columns of a file could be mapped to a known shape.

    Example:
        >>> suggest_mapping(["question", "answer", "id"])
        '--set data.prompt=question --set data.completion=answer'
    """
    lower = {str(key).lower(): key for key in reversed(keys[:_MOST_KEYS])}
    misspelt = {known: near[0] for known in sorted(MAPPABLE) if (near := _near(known, lower))}
    if misspelt:
        return "rename " + ", ".join(f"'{lower[key]}' to '{known}'" for known, key in misspelt.items())
    prompt = next((lower[name] for name in _QUESTIONS if name in lower), None)
    completion = next((lower[name] for name in _ANSWERS if name in lower and lower[name] != prompt), None)
    if prompt is not None and completion is not None:
        return f"--set data.prompt={prompt} --set data.completion={completion}"
    return "name the columns: --set data.prompt=COLUMN --set data.completion=COLUMN"


def _near(known: str, keys: dict[str, str]) -> list[str]:
    """Keys that look like a slip of the finger for a required key of several letters."""
    if known not in ("messages", "conversations", "instruction", "completion"):
        return []
    return [key for key in nearest(known, keys, count=1) if key != known and abs(len(key) - len(known)) <= 1]
