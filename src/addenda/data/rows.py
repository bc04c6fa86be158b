"""What a row of training data becomes: a conversation, then an example of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

__all__ = ["Conversation", "Example", "Message", "RowRef"]


@dataclass(frozen=True, slots=True)
class RowRef:
    """Where a row came from.

    Example:
        >>> str(RowRef("support.jsonl", line=12, index=11))
        'support.jsonl:12'
    """

    file: str
    """Path as the user gave it; ``<stdin>`` for standard input."""
    line: int
    """1-based line where the row starts (for parquet: 1-based row number)."""
    index: int
    """0-based position among the rows of its file."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str
    """The text; may be empty only beside tool calls or in a tool's answer."""
    trained: bool = True
    """False where the row gave this turn the weight 0: it is context, never a target."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls the assistant makes, in the form ``{"type": "function", "function": {"name", "arguments"}}``."""
    name: str = ""
    tool_call_id: str = ""
    reasoning: str = ""
    """The assistant's reasoning, for templates that read ``reasoning_content``."""

    def as_dict(self) -> dict[str, Any]:
        """Return the form a chat template reads; absent fields are left out.

        Example:
            >>> Message("user", "hello").as_dict()
            {'role': 'user', 'content': 'hello'}
        """
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name:
            out["name"] = self.name
        if self.tool_call_id:
            out["tool_call_id"] = self.tool_call_id
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        return out


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row, whatever its shape in the file: messages, or plain text."""

    messages: tuple[Message, ...]
    row: RowRef
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools the assistant may call."""
    text: str | None = None
    """The whole row for the shape ``text``; then ``messages`` is empty."""
    shape: str = "chat"
    """The shape it had in the file: chat, sharegpt, alpaca, prompt-completion, vertex or text."""

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal exactly when two rows teach the same thing.

        Example:
            >>> here, there = RowRef("a", 1, 0), RowRef("b", 9, 8)
            >>> Conversation((), here, text="x").digest == Conversation((), there, text="x").digest
            True
        """
        if self.text is not None:
            return text_digest(self.text)
        turns = [m.as_dict() if m.trained else {**m.as_dict(), "weight": 0} for m in self.messages]
        return messages_digest(turns, [dict(tool) for tool in self.tools])


@dataclass(frozen=True, slots=True)
class Example:
    """One row as token ids; ``trained[i]`` says that token i is a prediction target."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Same length as ``input_ids``; the first is always False, because nothing precedes it."""
    row: RowRef

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens are targets, in [0, len - 1]."""
        return sum(self.trained)


def messages_digest(turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> bytes:
    """Hash messages in the form ``as_dict`` gives; the order of keys does not count."""
    body = orjson.dumps(turns, str, orjson.OPT_SORT_KEYS)
    if tools:
        body += b"\x00" + orjson.dumps(tools, str, orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(body, digest_size=16).digest()


def text_digest(text: str) -> bytes:
    """Hash a row of plain text; never equal to the hash of messages."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, person=b"text").digest()
