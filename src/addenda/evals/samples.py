"""Held-out questions answered by the base and by the adapted model, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from addenda.bases.generate import BATCH, generate, prompt_ids
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress, Progress
from addenda.data.rows import Conversation
from addenda.errors import MethodError
from addenda.evals.results import SamplePair

if TYPE_CHECKING:
    from addenda.bases.loaded import LoadedBase

__all__ = ["SamplePair", "sample_pairs", "varied"]

MOST_CANDIDATES = 400
"""Questions looked at when picking; of a longer list the first ones."""


def sample_pairs(
    base: LoadedBase,
    handle: Handle,
    conversations: Iterable[Conversation],
    *,
    count: int = 8,
    max_new_tokens: int = 128,
    on_progress: OnProgress | None = None,
) -> list[SamplePair]:
    """Answer up to `count` held-out questions twice, greedily: with the adapter disabled, then enabled.

    A question is the user's last turn with all turns before it; its reference is the answer in the data. Rows that do
    not end with an assistant's answer to a user, rows with tools, and rows too long to answer are passed over; a base
    without a chat template is asked nothing. Which questions are asked depends on the questions alone, never on an
    answer.

    Args:
        base: a causal language model.
        handle: an adapter on it, enabled and not merged.
        conversations: held-out rows.
        count: most questions to ask.
        max_new_tokens: longest answer.
        on_progress: told of the answers done.

    Raises:
        MethodError: the adapter is disabled, merged or detached.
    """
    if not handle.active:
        raise MethodError(
            f"adapter '{handle.name}' is disabled, so nothing changes", hint="call enable() first"
        )
    if base.chat_template is None:
        return []
    fitting = (row for row in conversations if _asks(row) and _fits(base, row, max_new_tokens))
    chosen = varied(fitting, count)
    with handle.disabled():
        before = _answers(base, chosen, max_new_tokens, "answers of the base", on_progress)
    after = _answers(base, chosen, max_new_tokens, "answers of the adapted model", on_progress)
    return [
        SamplePair(
            messages=tuple((message.role, message.content) for message in row.messages[:-1]),
            reference=row.messages[-1].content,
            before=first,
            after=second,
        )
        for row, first, second in zip(chosen, before, after, strict=True)
    ]


def varied(conversations: Iterable[Conversation], count: int) -> list[Conversation]:
    """Return up to `count` conversations whose questions share few words: the first, then each time the least like.

    Args:
        conversations: rows whose turn before the last is the question.
        count: how many at most.
    """
    left = list(islice(conversations, MOST_CANDIDATES))
    words = [frozenset(row.messages[-2].content.lower().split()) for row in left]
    likeness = [0.0] * len(left)
    chosen: list[int] = []
    while len(chosen) < min(count, len(left)):
        best = min((i for i in range(len(left)) if i not in chosen), key=lambda i: likeness[i])
        chosen.append(best)
        likeness = [max(known, _overlap(words[i], words[best])) for i, known in enumerate(likeness)]
    return [left[index] for index in chosen]


def _answers(
    base: LoadedBase, rows: list[Conversation], max_new_tokens: int, task: str, on_progress: OnProgress | None
) -> list[str]:
    prompts = [[message.as_dict() for message in row.messages[:-1]] for row in rows]
    answers: list[str] = []
    while len(answers) < len(prompts):
        if on_progress:
            on_progress(Progress(task, done=len(answers), total=len(prompts), unit="answers"))
        batch = prompts[len(answers) : len(answers) + BATCH]
        answers += generate(base, batch, max_new_tokens=max_new_tokens)
    if on_progress:
        on_progress(Progress(task, done=len(answers), total=len(prompts), unit="answers"))
    return answers


def _asks(row: Conversation) -> bool:
    turns = row.messages
    return len(turns) > 1 and (turns[-2].role, turns[-1].role) == ("user", "assistant") and not row.tools


def _fits(base: LoadedBase, row: Conversation, max_new_tokens: int) -> bool:
    """Whether the question leaves room for an answer of full length."""
    prompt = prompt_ids(base, [turn.as_dict() for turn in row.messages[:-1]])
    return len(prompt) + max_new_tokens <= base.room


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))
