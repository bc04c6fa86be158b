"""The shapes a row may have, and how each becomes the turns of one conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from addenda.data.embedded import parse_embedded
from addenda.data.problem import Path, Problem, Turn
from addenda.data.rows import Conversation, Message, RowRef

__all__ = ["MAPPABLE", "SHAPES", "Shape", "build", "matching", "preference_keys"]

Record = Mapping[str, Any]
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_MOST_PROBLEMS = 20
_VERTEX_ROLES = {"model": "assistant", "function": "tool"}


@dataclass(frozen=True)
class Shape:
    """One way to write a training row."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    turns: Callable[[Record], tuple[list[Turn], list[Problem]]]
    """The turns of a row, and what is wrong with the fields that hold them."""


def matching(keys: Iterable[str]) -> list[str]:
    """Return the names of all shapes whose required keys are present.

    Example:
        >>> matching(["prompt", "completion", "id"]), matching(["question", "answer"])
        (['prompt-completion'], [])
    """
    present = set(keys)
    return [shape.name for shape in SHAPES.values() if shape.required <= present]


def preference_keys(record: Record) -> list[str]:
    """Return the keys that mark a row of preferences or judgements, which no conversation has."""
    marks = [
        key for key in ("chosen", "rejected", "preferred_output", "non_preferred_output") if key in record
    ]
    if not marks and {"prompt", "completion", "label"} <= set(record):
        marks = ["label"]
    return marks


def build(shape: str, record: Record, turns: list[Turn], row: RowRef) -> Conversation:
    """Make the conversation of a row in which no check found an error."""
    if shape == "text":
        return Conversation((), row, text=record["text"], shape=shape)
    tools = record.get("tools") or ()
    if isinstance(tools, str):
        tools = parse_embedded(tools) if tools.strip() else ()
    return Conversation(tuple(_message(turn.fields) for turn in turns), row, tuple(tools), shape=shape)


def _message(fields: dict[str, Any]) -> Message:
    calls = fields.get("tool_calls") or ()
    if fields.get("function_call"):
        calls = [{"type": "function", "function": fields["function_call"]}]
    return Message(
        role={"developer": "system", "function": "tool"}.get(fields["role"], fields["role"]),
        content=fields.get("content") or "",
        trained=fields.get("weight", 1) not in (0, False),
        tool_calls=tuple(_decoded(call) for call in calls),
        name=fields.get("name") or "",
        tool_call_id=fields.get("tool_call_id") or "",
        reasoning=fields.get("reasoning_content") or fields.get("thinking") or "",
    )


def _decoded(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a call its arguments as an object: chat templates write them out as JSON themselves."""
    arguments = call["function"].get("arguments") or {}
    arguments = parse_embedded(arguments) if isinstance(arguments, str) else arguments
    return {**call, "type": "function", "function": {**call["function"], "arguments": arguments}}


def _listed(value: object, path: Path) -> tuple[list[Turn], list[Problem]]:
    """Turns of a list of messages, in OpenAI's or ShareGPT's spelling."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else describe(value)
        return [], [Problem("missing_messages_list", f"{found} where a list of messages belongs", path)]
    turns, problems = [], []
    for index, item in enumerate(value):
        here = (*path, index)
        if isinstance(item, dict):
            turns.append(_sharegpt_turn(item, here) if "from" in item else _chat_turn(item, here))
        else:
            problems.append(Problem("data_type", f"{describe(item)} where a message object belongs", here))
            if len(problems) == _MOST_PROBLEMS:
                break
    return turns, problems


def _chat_turn(item: dict[str, Any], path: Path) -> Turn:
    fields = dict(item)
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(fields["content"])
    return Turn(path, fields, {})


def _sharegpt_turn(item: dict[str, Any], path: Path) -> Turn:
    fields: dict[str, Any] = {key: value for key, value in item.items() if key not in ("from", "value")}
    role = item["from"]
    fields["role"] = _renamed(role, _SHAREGPT_ROLES)
    if "value" in item:
        fields["content"] = item["value"]
    if role == "function_call" and isinstance(item.get("value"), str):
        fields.update(content="", tool_calls=_called(item["value"]))
    return Turn(path, fields, {"role": ("from",), "content": ("value",), "tool_calls": ("value",)})


def _renamed(role: object, names: Mapping[str, str]) -> object:
    """The role under OpenAI's name; what is no text stays for the check of roles to name."""
    return names.get(role, role) if isinstance(role, str) else role


def _called(value: str) -> object:
    """Read a ShareGPT function call; what cannot be read is left for the check of tool calls to name."""
    try:
        calls = parse_embedded(value)
    except ValueError:
        return value
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _joined(parts: object) -> object:
    """Join content given as text parts; anything but text is left for the check of contents to name."""
    if not isinstance(parts, list):
        return parts
    texts = [
        part.get("text") for part in parts if isinstance(part, dict) and part.get("type", "text") == "text"
    ]
    whole = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else parts  # type: ignore[arg-type]


def _field(record: Record, key: str, role: str, *, weight: int = 1) -> Turn:
    fields = {"role": role, "content": record[key]}
    if not weight:
        fields["weight"] = 0
    return Turn((key,), fields, {"role": (), "content": ()})


def _system(record: Record, key: str = "system") -> list[Turn]:
    return [_field(record, key, "system")] if record.get(key) not in (None, "") else []


def _tools(record: Record) -> list[Problem]:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_embedded(tools) if tools.strip() else []
        except ValueError:
            tools = record["tools"]
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return []
    return [Problem("data_type", f"{describe(tools)} where a list of tool schemas belongs", ("tools",))]


def _chat(record: Record) -> tuple[list[Turn], list[Problem]]:
    turns, problems = _listed(record["messages"], ("messages",))
    return turns, problems + _tools(record)


def _sharegpt(record: Record) -> tuple[list[Turn], list[Problem]]:
    turns, problems = _listed(record["conversations"], ("conversations",))
    return _system(record) + turns, problems + _tools(record)


def _alpaca(record: Record) -> tuple[list[Turn], list[Problem]]:
    turns, problems = _history(record.get("history") or [])
    question = _field(record, "instruction", "user")
    extra = record.get("input")
    if extra not in (None, ""):
        if isinstance(extra, str) and isinstance(record["instruction"], str):
            question.fields["content"] = f"{record['instruction']}\n{extra}"
        else:
            problems.append(Problem("missing_content", f"{describe(extra)} where text belongs", ("input",)))
    return [*_system(record), *turns, question, _field(record, "output", "assistant")], problems


def _history(pairs: object) -> tuple[list[Turn], list[Problem]]:
    turns: list[Turn] = []
    if not isinstance(pairs, list):
        return [], [Problem("data_type", f"{describe(pairs)} where a list of pairs belongs", ("history",))]
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"{describe(pair)} where a pair of question and answer belongs"
            return [], [Problem("data_type", found, ("history", index))]
        for place, role in enumerate(("user", "assistant")):
            fields = {"role": role, "content": pair[place]}
            turns.append(Turn(("history", index, place), fields, {"role": (), "content": ()}))
    return turns, []


def _prompt_completion(record: Record) -> tuple[list[Turn], list[Problem]]:
    prompt, completion = record["prompt"], record["completion"]
    before, problems = [_field(record, "prompt", "user")], _tools(record)
    after = [_field(record, "completion", "assistant")]
    if isinstance(prompt, list):
        before, more = _listed(prompt, ("prompt",))
        problems += more
        for turn in before:
            if turn.fields.get("role") == "assistant":  # an answer inside the prompt is context
                turn.fields.setdefault("weight", 0)
    if isinstance(completion, list):
        after, more = _listed(completion, ("completion",))
        problems += more
    return _system(record) + before + after, problems


def _vertex(record: Record) -> tuple[list[Turn], list[Problem]]:
    contents = record["contents"]
    if not isinstance(contents, list) or not all(isinstance(item, dict) for item in contents):
        return [], [
            Problem("missing_messages_list", f"{describe(contents)} where a list belongs", ("contents",))
        ]
    turns = []
    if isinstance(record.get("systemInstruction"), dict):
        fields = {"role": "system", "content": _joined(record["systemInstruction"].get("parts"))}
        turns.append(Turn(("systemInstruction",), fields, {"role": ("role",), "content": ("parts",)}))
    for index, item in enumerate(contents):
        fields = {key: value for key, value in item.items() if key not in ("parts", "role")}
        if "role" in item:
            fields["role"] = _renamed(item["role"], _VERTEX_ROLES)
        if "parts" in item:
            fields["content"] = _joined(item["parts"])
        turns.append(Turn(("contents", index), fields, {"content": ("parts",)}))
    return turns, []


def _text(record: Record) -> tuple[list[Turn], list[Problem]]:
    text = record["text"]
    if isinstance(text, str) and text.strip():
        return [], []
    found = "an empty string" if isinstance(text, str) else describe(text)
    return [], [Problem("missing_content", f"{found} where text belongs", ("text",))]


def describe(value: object) -> str:
    """Name a JSON value shortly: its kind, and itself where it is small.

    Example:
        >>> describe(None), describe(3.5), describe("a" * 99), describe({})
        ('null', 'the number 3.5', "the string 'aaaaaaaaaaaaaaaaaaaa…'", 'an object')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the string '{value[:20]}{'…' if len(value) > 20 else ''}'"
    if isinstance(value, int | float):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "an object"


def _shape(name: str, required: str, optional: str, turns: Callable[..., Any]) -> Shape:
    return Shape(name, frozenset(required.split()), frozenset(optional.split()), turns)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _shape("chat", "messages", "tools", _chat),
        _shape("sharegpt", "conversations", "system tools", _sharegpt),
        _shape("alpaca", "instruction output", "input system history", _alpaca),
        _shape("prompt-completion", "prompt completion", "system tools", _prompt_completion),
        _shape("vertex", "contents", "systemInstruction", _vertex),
        _shape("text", "text", "", _text),
    )
}
"""All shapes by name."""

MAPPABLE: frozenset[str] = frozenset().union(*(shape.required | shape.optional for shape in SHAPES.values()))
"""The keys a column of a file can be mapped to."""
