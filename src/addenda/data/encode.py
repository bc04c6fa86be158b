"""From a conversation to token ids and a mask that says which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from addenda.core.progress import OnProgress, Progress
from addenda.data.dataset import to_finding
from addenda.data.findings import Finding, Report
from addenda.data.problem import Problem
from addenda.data.raw import RawRow
from addenda.data.rows import Conversation, Example, Message
from addenda.data.store import ExampleStore
from addenda.data.template import Rendered, Span, Template, TemplateFault
from addenda.errors import ConfigError, DataError
from addenda.templates import Guard, Pieces, tokens_of

__all__ = ["Encoded", "Encoder", "Overflow", "TrainOn", "encode", "encode_rows"]

TrainOn = Literal["assistant", "last", "all"]
Overflow = Literal["drop", "cut"]
_BATCH = 256


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations for one base.

    The whole conversation is rendered by the chat template and tokenized once. Trained are the tokens of the
    assistant's text and of the end-of-turn token after it, so that the model learns to stop; not the white
    space behind that, and nothing the template writes by itself. A row of plain text is trained on as a whole,
    with the end-of-text token. Control tokens that stand in a message's text are encoded as plain text.

    Args:
        tokenizer: a fast tokenizer of transformers.
        chat_template: Jinja text; None for a base without one, then only prompt/completion and text rows work.
        train_on: ``assistant`` every answer, ``last`` the last answer only, ``all`` every token of the row. A
            message with the weight 0 is never trained on.
        max_tokens: longest example, at least 2; None has no limit.
        overflow: ``drop`` leaves a longer row out; ``cut`` keeps its beginning, and leaves it out if nothing of it
            is trained on any more.

    Raises:
        ConfigError: a setting is out of range, or the tokenizer has no fast backend.
    """

    tokenizer: Any
    chat_template: str | None
    train_on: TrainOn = "assistant"
    max_tokens: int | None = None
    overflow: Overflow = "drop"

    def __post_init__(self) -> None:
        choices = {"train_on": ("assistant", "last", "all"), "overflow": ("drop", "cut")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                hint = f"{name} is one of {', '.join(allowed)}"
                raise ConfigError(f"{name} is '{getattr(self, name)}', which does not exist", hint=hint)
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(f"max_tokens must be at least 2, got {self.max_tokens}", hint="512 is usual")
        tokens_of(self.tokenizer)

    def encode(self, conversation: Conversation) -> tuple[Example | None, list[Problem]]:
        """Encode one conversation; None where it cannot be trained on, with the reason among the problems."""
        return next(self.encode_batch([conversation]))

    def encode_batch(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[Example | None, list[Problem]]]:
        """Encode several conversations; their texts are tokenized together, which is faster."""
        tokens = tokens_of(self.tokenizer)
        prepared = [self._prepare(conversation) for conversation in conversations]
        texts = [one.rendered.text if one.rendered and not one.guard else "" for one in prepared]
        for conversation, one, pieces in zip(conversations, prepared, tokens.encode(texts), strict=True):
            if one.rendered is None:
                yield None, list(one.problems)
                continue
            example, problems = self._example(conversation, one, pieces)
            yield example, [*one.problems, *problems]

    def _prepare(self, conversation: Conversation) -> _Prepared:
        if conversation.text is not None:
            return _plain_text(self.tokenizer, conversation.text)
        if self.chat_template is None:
            return _without_template(self.tokenizer, conversation)
        messages: Sequence[Message] = conversation.messages
        guard = tokens_of(self.tokenizer).guard(_said(conversation), self.chat_template)
        if guard:
            messages = [_hidden(message, guard) for message in messages]
            tools = tuple(guard.hide(dict(tool)) for tool in conversation.tools or ())
            conversation = replace(conversation, tools=tools)
        try:
            rendered = Template(self.tokenizer, self.chat_template).render(conversation, messages)
        except TemplateFault as fault:
            return _Prepared(None, problems=[fault.problem])
        return _Prepared(rendered, guard, list(rendered.problems))

    def _example(
        self, conversation: Conversation, one: _Prepared, pieces: Pieces
    ) -> tuple[Example | None, list[Problem]]:
        rendered, problems = one.rendered, list[Problem]()
        assert rendered is not None
        tokens = tokens_of(self.tokenizer)
        if one.guard:
            pieces, plain = tokens.encode_guarded(rendered.text, one.guard)
            rendered = _restored(rendered, one.guard, plain)
        ids = list(pieces.ids)
        trained = _mask(pieces.offsets, self._spans(conversation, rendered))
        if conversation.text is not None or self.chat_template is None:
            ids, trained = [*tokens.prefix, *ids], [False] * len(tokens.prefix) + trained
        if not rendered.ends:
            problems += self._finish(conversation, ids, trained)
        if trained:
            trained[0] = False
        example = Example(tuple(ids), tuple(trained), conversation.row)
        example_or_none, more = self._fit(example)
        return example_or_none, problems + more

    def _finish(self, conversation: Conversation, ids: list[int], trained: list[bool]) -> list[Problem]:
        """Put the end-of-text token after a row that has no end token of its own."""
        eos = tokens_of(self.tokenizer).eos_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
            trained.append(conversation.text is not None or trained[-1:] == [True] or any(trained))
        if conversation.text is not None or self.chat_template is None:
            return []
        return [
            Problem("no_end_token", "no special token after an answer; the end-of-text token was put there")
        ]

    def _spans(self, conversation: Conversation, rendered: Rendered) -> list[Span]:
        """The characters that are trained on."""
        messages = conversation.messages
        if conversation.text is not None:
            return [(0, len(rendered.text))]
        kept = [i for i in rendered.answers if messages[i].trained]
        if self.train_on == "assistant":
            return [rendered.answers[i] for i in kept]
        if self.train_on == "last":
            last = max(rendered.answers, default=None)
            return [rendered.answers[i] for i in kept if i == last]
        left_out = [span for i, span in rendered.answers.items() if not messages[i].trained]
        bounds = [0, *(edge for span in left_out for edge in span), len(rendered.text)]
        return list(zip(bounds[::2], bounds[1::2], strict=True))

    def _fit(self, example: Example) -> tuple[Example | None, list[Problem]]:
        length, limit = len(example), self.max_tokens
        if not example.trained_tokens:
            return None, [
                Problem("no_trainable_token", f"none of its {length} tokens is trained on; left out")
            ]
        if limit is None or length <= limit:
            return example, []
        if self.overflow == "drop":
            return None, [
                Problem("row_too_many_tokens", f"{length:,} tokens, the limit is {limit:,}; left out")
            ]
        cut = replace(example, input_ids=example.input_ids[:limit], trained=example.trained[:limit])
        found = f"{length:,} tokens, the limit is {limit:,}; cut at the end"
        if cut.trained_tokens:
            return cut, [Problem("row_too_many_tokens", found)]
        found += "; nothing that is trained on is left, so the row was left out"
        return None, [
            Problem("row_too_many_tokens", found),
            Problem("no_trainable_token", "its answer was cut away"),
        ]


@dataclass(frozen=True)
class _Prepared:
    """A conversation as text, or why it cannot be."""

    rendered: Rendered | None
    guard: Guard | None = None
    problems: Sequence[Problem] = ()


@dataclass(frozen=True)
class Encoded:
    """The examples of a data set, and what happened to rows that did not become one."""

    examples: Sequence[Example]
    report: Report
    dropped: int
    """Rows left out: too long, nothing to train on, or refused by the template."""
    cut: int
    """Rows whose end was cut away."""
    tokens: int
    """Tokens of all examples, trained or not."""
    trained_tokens: int


def encode(
    conversation: Conversation,
    tokenizer: Any,
    *,
    chat_template: str | None,
    train_on: TrainOn = "assistant",
    max_tokens: int | None = None,
    overflow: Overflow = "drop",
) -> Example | Finding:
    """Encode one conversation, or say why it cannot be trained on; see `Encoder` for the settings."""
    encoder = Encoder(tokenizer, chat_template, train_on, max_tokens, overflow)
    example, problems = encoder.encode(conversation)
    return example if example is not None else _finding(problems[-1], conversation)


def encode_rows(
    conversations: Iterable[Conversation], encoder: Encoder, *, on_progress: OnProgress | None = None
) -> Encoded:
    """Encode all rows of a data set; the examples lie in a temporary file, not in memory.

    Args:
        conversations: for instance one side of a split.
        encoder: the settings.
        on_progress: told how many rows were done.

    Raises:
        DataError: a row cannot be written by the chat template, or no row is left to train on.
    """
    total = len(conversations) if isinstance(conversations, Sized) else None
    store, report = ExampleStore(), Report()
    rows = dropped = cut = trained = 0
    source = iter(conversations)
    while batch := list(islice(source, _BATCH)):
        for conversation, (example, problems) in zip(batch, encoder.encode_batch(batch), strict=True):
            for problem in problems:
                report.add(_finding(problem, conversation))
            if example is None:
                dropped += 1
                continue
            store.append(example)
            trained += example.trained_tokens
            cut += any(problem.code == "row_too_many_tokens" for problem in problems)
        rows += len(batch)
        if on_progress:
            on_progress(Progress("encode", rows, total, "rows"))
    _require_examples(store, report, rows)
    return Encoded(store, report, dropped, cut, store.tokens, trained)


def _require_examples(store: ExampleStore, report: Report, rows: int) -> None:
    if report.has_errors:
        raise DataError(
            f"the chat template cannot write {report.errors:,} of {rows:,} rows\n"
            + "\n".join(report.lines()),
            hint="correct these rows, or choose another base",
        )
    if rows and not len(store):
        raise DataError(
            f"none of {rows:,} rows has a token to train on\n" + "\n".join(report.lines()),
            hint="raise the token limit, give answers the weight 1, or set data.train_on=all",
        )


def _finding(problem: Problem, conversation: Conversation) -> Finding:
    row = conversation.row
    return to_finding(problem, row.file, RawRow(row.index, row.line, -1))


def _mask(offsets: Sequence[Span], spans: list[Span]) -> list[bool]:
    """Say for each token whether its characters lie in a span; both are ascending.

    Example:
        >>> _mask([(0, 3), (3, 5), (5, 5), (5, 9)], [(4, 6)])
        [False, True, True, True]
    """
    out, which = [], 0
    for start, end in offsets:
        while which < len(spans) and spans[which][1] <= start:
            which += 1
        inside = which < len(spans) and (spans[which][0] < end or spans[which][0] <= start == end)
        out.append(inside)
    return out


def _said(conversation: Conversation) -> str:
    """Every text of the messages and the tools."""
    said = [f"{m.content}\x00{m.reasoning}\x00{m.name}\x00{m.tool_calls}" for m in conversation.messages]
    return "\x00".join([*said, str(conversation.tools or "")])


def _hidden(message: Message, guard: Guard) -> Message:
    """A message with stand-ins for the control tokens in its texts."""
    spared = message.role == "assistant"
    return replace(
        message,
        content=guard.hide(message.content, spared=spared),
        reasoning=guard.hide(message.reasoning, spared=spared),
        name=guard.hide(message.name, spared=spared),
        tool_calls=tuple(guard.hide(dict(call), spared=spared) for call in message.tool_calls),
    )


def _restored(rendered: Rendered, guard: Guard, plain: str) -> Rendered:
    """Move the places found in the guarded text to the text as it was written."""
    answers = {
        index: (len(guard.restore(rendered.text[:start])), len(guard.restore(rendered.text[:end])))
        for index, (start, end) in rendered.answers.items()
    }
    return Rendered(plain, answers, ends=rendered.ends)


def _plain_text(tokenizer: Any, text: str) -> _Prepared:
    guard = tokens_of(tokenizer).guard(text, "")
    return _Prepared(Rendered(guard.hide(text) if guard else text, {}, ends=False), guard)


def _without_template(tokenizer: Any, conversation: Conversation) -> _Prepared:
    """Prompt and completion one after the other; anything else needs a template."""
    roles = [message.role for message in conversation.messages]
    if conversation.shape != "prompt-completion" or roles != ["user", "assistant"]:
        return _Prepared(None, problems=[Problem("no_chat_template", "the base has no chat template")])
    guard = tokens_of(tokenizer).guard(_said(conversation), "")
    messages = [_hidden(message, guard) if guard else message for message in conversation.messages]
    prompt, completion = (message.content for message in messages)
    text = prompt + completion
    return _Prepared(Rendered(text, {1: (len(prompt), len(text))}, ends=False), guard)
