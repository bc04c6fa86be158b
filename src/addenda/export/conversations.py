"""Conversations by which a runtime's chat template and tokenizer are compared with those of the training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["CONVERSATIONS", "Conversed"]


@dataclass(frozen=True)
class Conversed:
    """Messages as a chat template takes them, and the tools that are offered."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


_SAID = (
    "Where is my order 4711?",
    "Please write a function that adds two numbers.",
    "What is the capital of Australia, and how many people live there?",
    "  two spaces before, two after  ",
    "a line\nand another\n\nand one after an empty one",
    "\ttabs\tbetween\twords\t",
    "ends with a line feed\n",
    "\n\nbegins with two",
    "windows\r\nline\r\nends",
    "no-break\u00a0space and zero\u200bwidth",
    "Grüße aus Köln, señor! Ça va? Příliš žluťoučký kůň.",
    "日本語のテキストと中文文本",
    "שלום עולם, مرحبا بالعالم",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 done",
    "1234567890 12.50 1,000,000 -7 0x1F 3.14e-10",
    "don't can't it's I'll we've O'Neill's",
    "if (a < b && c > d) { return a[0]; } // comment",
    "    indented = 4\n\tmixed = 8\n",
    "<b>not a tag</b> &amp; {{ braces }} {% raw %}",
    "https://example.com/a?b=c&d=%20e#f",
    "UPPER lower MiXeD camelCase snake_case kebab-case",
    "e\u0301 composed is \u00e9",
    "x" * 60,
    ".,;:!?-_()[]{}\"'`~@#$%^&*+=|\\/",
)
_SYSTEM = (
    "You are a helpful assistant of a small bakery.",
    "Answer in one sentence.\nBe polite.",
    "  Answer in German.  ",
)
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place today",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A town"}},
            "required": ["place"],
        },
    },
}


def _turns(*texts: str, system: str | None = None) -> tuple[dict[str, Any], ...]:
    roles = ("user", "assistant")
    said = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return tuple(([{"role": "system", "content": system}] if system is not None else []) + said)


def _made() -> Iterator[Conversed]:
    count = len(_SAID)
    for text in _SAID:
        yield Conversed(_turns(text))
    for number, system in enumerate(_SYSTEM * 4):
        yield Conversed(_turns(_SAID[number], system=system))
    for number in range(12):
        others = (_SAID[(number * 5 + step) % count] for step in range(3))
        yield Conversed(_turns(*others))
    for number in range(6):
        others = (_SAID[(number * 7 + step) % count] for step in range(5))
        yield Conversed(_turns(*others, system=_SYSTEM[number % 3]))
    for number in range(4):
        yield Conversed(_turns(_SAID[number], system=None if number % 2 else _SYSTEM[0]), (_WEATHER,))


CONVERSATIONS: tuple[Conversed, ...] = tuple(_made())
"""Single questions, system prompts, several turns, tools, and white space of all kinds."""
