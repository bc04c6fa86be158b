"""Rendering a conversation by the base's chat template, and finding the assistant's part of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from addenda.data.findings import Severity
from addenda.data.problem import Path, Problem
from addenda.data.rows import Conversation, Message
from addenda.templates import TemplateRefusal, render, tokens_of

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
        out.problems += self._dropped(out, conversation, messages)
        return out

    def _dropped(
        self, out: Rendered, conversation: Conversation, messages: Sequence[Message]
    ) -> Iterator[Problem]:
        """What stands in the row but not in its text; an answer of which nothing is left is an error."""
        for index, message in enumerate(messages):
            if index in out.answers:
                start, end = out.answers[index]
                lost = _lost(message, self._token.sub("", out.text[start:end]))
                if lost:
                    raise TemplateFault(_dropping(f"the {lost} of answer {index}", ("messages", index)))
            elif message.role != "tool" and message.content.strip() not in out.text:
                whose = f"the text of message {index}, from '{message.role}'"
                yield _dropping(whose, ("messages", index), severity="warning")
        if conversation.tools and not any(name in out.text for name in _names(conversation.tools)):
            yield _dropping("the tools", ("tools",), severity="warning")

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
        end = self._end_of_earlier(out.text, start, as_last=until[start:], content=turns[index]["content"])
        if end is None:
            found = f"answer {index} cannot be found in the text of the whole conversation"
            raise TemplateFault(Problem("template_not_prefix_stable", found, ("messages", index)))
        out.problems.append(_unstable("an answer is written otherwise when it is the last", index))
        return end

    def _end_of_earlier(self, text: str, start: int, *, as_last: str, content: str) -> int | None:
        """Where an answer ends that the template writes otherwise when it is the last one."""
        for cut in range(
            1, len(as_last)
        ):  # the last one begins with something more, such as a thinking block
            if text.startswith(as_last[cut:], start) and self._token.search(as_last, cut):
                return start + len(as_last) - cut
        content = content.strip()  # it ends otherwise; its content is still there
        at = text.find(content, start) + len(content)
        end = self._token.search(text, at) if content and at >= len(content) else None
        return None if end is None or text[at : end.start()].strip() else end.end()

    def _up_to_end_token(self, out: Rendered, start: int, end: int) -> Span:
        """Leave out the white space after the answer's end-of-turn token."""
        tokens = list(self._token.finditer(out.text, start, end))
        last = tokens[-1] if tokens else None
        out.ends = last is not None and not out.text[last.end() : end].strip()
        return (start, last.end()) if last is not None and out.ends else (start, end)


def _lost(message: Message, written: str) -> str:
    """What of an answer is not in its text, of which the control tokens were taken out."""
    if not all(name in written for name in _names(message.tool_calls)):
        return "tool calls"
    return "text" if message.content.strip() and not written.strip() else ""


def _names(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of functions, in OpenAI's form or without its wrapper."""
    functions = [call.get("function") or call for call in calls]
    return [str(function["name"]) for function in functions if function.get("name")]


def _dropping(what: str, path: Path, *, severity: Severity = "error") -> Problem:
    return Problem("template_drops_text", f"the chat template leaves out {what}", path, severity=severity)


def _unstable(found: str, index: int) -> Problem:
    fix = "nothing for single answers; compare the base's prompt with the rows shown by check --show"
    return Problem("template_not_prefix_stable", found, ("messages", index), fix=fix, severity="warning")


def _shown(text: str, limit: int = 60) -> str:
    return text[:limit].replace("\n", "\\n")
