"""Rendering a conversation by the base's chat template, and finding the assistant's part of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from addenda.data.problem import Problem
from addenda.data.rows import Conversation, Message
from addenda.data.tokens import tokens_of
from addenda.templates import TemplateRefusal, render

__all__ = ["Rendered", "Span", "Template", "TemplateFault"]

Span = tuple[int, int]


class TemplateFault(Exception):
    """A conversation this template cannot write; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.found)
        self.problem = problem


@dataclass
class Rendered:
    """A conversation as the model will read it."""

    text: str
    answers: dict[int, Span]
    """For each assistant message its characters, from the end of the prompt to the end-of-turn token."""
    problems: list[Problem] = field(default_factory=list)
    """What was noticed, all warnings."""
    ends: bool = True
    """Whether the last answer ends with a special token."""


class Template:
    """A chat template bound to a tokenizer.

    Args:
        tokenizer: its special tokens are what the template writes by name.
        source: the template's Jinja text.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._source, self._special_tokens = source, tokenizer.special_tokens_map
        self._token = tokens_of(tokenizer).added_pattern

    def render(self, conversation: Conversation, messages: Sequence[Message]) -> Rendered:
        """Write the conversation, and find what the assistant says in it.

        For an answer at position i, the text of the messages before it with the prompt for an answer is the
        beginning of the whole text; what follows is what the model has to write.

        Raises:
            TemplateFault: the template refuses the conversation, or an answer cannot be found in its text.
            UnsafeError: rendering takes more time or memory than any sound template does.
        """
        turns = [message.as_dict() for message in messages]
        tools = [dict(tool) for tool in conversation.tools] or None
        out = Rendered(self._write(turns, tools), {})
        for index, message in enumerate(messages):
            if message.role == "assistant":
                start = self._start(out, turns, tools, index)
                end = self._end(out, turns, tools, index=index, start=start)
                out.answers[index] = self._up_to_end_token(out, start, end)
        return out

    def _write(self, turns: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        try:
            return render(
                self._source,
                turns,
                tools=tools,
                add_generation_prompt=prompt,
                special_tokens=self._special_tokens,
            )
        except TemplateRefusal as error:
            raise TemplateFault(Problem("template_refused", f"the chat template says: {error}")) from error

    def _start(self, out: Rendered, turns: list[dict[str, Any]], tools: Any, index: int) -> int:
        """Where the answer begins: just after the prompt the model sees at use."""
        if index == 0:
            return 0
        prompt = self._write(turns[:index], tools, prompt=True)
        if out.text.startswith(prompt):
            return len(prompt)
        before = self._write(turns[:index], tools)
        if not out.text.startswith(before):
            found = f"the text of the messages before answer {index} is not the beginning of the whole text"
            raise TemplateFault(Problem("template_not_prefix_stable", found, ("messages", index)))
        found = (
            f"the prompt for an answer is '{_shown(prompt[len(before) :])}', a past answer begins otherwise"
        )
        out.problems.append(_unstable(found, index))
        return next(i for i, (a, b) in enumerate(zip(prompt, out.text + "\0", strict=False)) if a != b)

    def _end(self, out: Rendered, turns: list[dict[str, Any]], tools: Any, *, index: int, start: int) -> int:
        """Where the text of the answer ends, with whatever the template puts after it."""
        if index == len(turns) - 1:
            return len(out.text)
        until = self._write(turns[: index + 1], tools)
        if out.text.startswith(until) and len(until) >= start:
            return len(until)
        # The template writes the last answer otherwise than earlier ones; the content itself is still there.
        content = turns[index]["content"].strip()
        at = out.text.find(content, start)
        end = self._token.search(out.text, at + len(content)) if content and at >= 0 else None
        if end is None or out.text[at + len(content) : end.start()].strip():
            found = f"answer {index} cannot be found in the text of the whole conversation"
            raise TemplateFault(Problem("template_not_prefix_stable", found, ("messages", index)))
        out.problems.append(_unstable("an answer is written otherwise when it is the last", index))
        return end.end()

    def _up_to_end_token(self, out: Rendered, start: int, end: int) -> Span:
        """Leave out the white space after the answer's end-of-turn token."""
        tokens = list(self._token.finditer(out.text, start, end))
        last = tokens[-1] if tokens else None
        out.ends = last is not None and not out.text[last.end() : end].strip()
        return (start, last.end()) if last is not None and out.ends else (start, end)


def _unstable(found: str, index: int) -> Problem:
    fix = "nothing for single answers; compare the base's prompt with the rows shown by check --show"
    return Problem("template_not_prefix_stable", found, ("messages", index), fix=fix, severity="warning")


def _shown(text: str, limit: int = 60) -> str:
    return text[:limit].replace("\n", "\\n")
