"""How far an adapter moved the base on general prompts: the divergence of their next-token probabilities.

The prompts are 48 short questions with answers, written for this purpose and shipped in ``general_prompts.jsonl``:
everyday matters, explanations, facts, sums, code, writing, advice, and a few languages. They are no benchmark of any
skill; they are a place to see whether the model changed where it was not meant to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from addenda.bases.packed import PackedModel, evaluating
from addenda.bases.scores import chunks
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress, Progress
from addenda.data.encode import encode
from addenda.data.pack import PackedBatch, collate, plan_batches
from addenda.data.rows import Conversation, Example, Message, RowRef
from addenda.errors import DataError, MethodError
from addenda.evals.heldout import sample_of
from addenda.evals.results import KLEstimate, PromptShift
from addenda.intervals import interval_of_ratio

if TYPE_CHECKING:
    from addenda.bases.loaded import LoadedBase

__all__ = ["GeneralPrompt", "general_kl", "general_prompts", "kl_divergence"]

PROMPTS_FILE = "general_prompts.jsonl"
TOKENS_PER_BATCH = 512
POSITIONS_AT_ONCE = 64
"""Two sets of scores over the vocabulary and what is made of them in fp32 exist for so many positions, so that this
measurement needs less memory than the training before it."""


@dataclass(frozen=True)
class GeneralPrompt:
    """One general question and an answer to it."""

    topic: str
    prompt: str
    answer: str


def general_prompts() -> list[GeneralPrompt]:
    """Return the shipped prompts.

    Example:
        >>> len(general_prompts())
        48
    """
    text = resources.files("addenda.evals").joinpath(PROMPTS_FILE).read_text(encoding="utf-8")
    return [GeneralPrompt(**json.loads(line)) for line in text.splitlines()]


def general_kl(
    base: LoadedBase,
    handle: Handle,
    *,
    packed: PackedModel | None = None,
    prompts: Sequence[GeneralPrompt] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> KLEstimate:
    """Measure the mean KL(base || adapted) per token, over the full vocabulary, on general prompts.

    Each prompt and its answer are written by the base's chat template (as plain text where it has none). At every
    position that predicts a token of that text, the base (the adapter disabled) and the adapted model give their
    probabilities p and q for the next token, and KL = sum p (ln p - ln q) in nats. Left out is the opening that the
    template gives every prompt alike: it would count the same positions once a prompt. The result is exactly 0 where
    the adapter changes nothing. In a half-precision base, rounding alone adds in the order of 0.001.

    Args:
        base: a causal language model.
        handle: an adapter on it, enabled and not merged.
        packed: the runner, if one was made already.
        prompts: other prompts than the shipped ones.
        seed: of the bootstrap over prompts.
        on_progress: told of the prompts done.

    Raises:
        MethodError: the adapter is disabled, merged or detached.
        DataError: the base can hold none of the prompts.
    """
    if not handle.active:
        raise MethodError(
            f"adapter '{handle.name}' is disabled, so there is nothing to compare", hint="call enable() first"
        )
    chosen = general_prompts() if prompts is None else prompts
    kept = _encoded(base, chosen)
    packed = packed or PackedModel(base.model)
    opening = _shared_opening([example for _, example in kept])
    shifts: dict[int, _Shift] = {}
    with evaluating(base.model):
        for rows in plan_batches([len(example) for _, example in kept], tokens_per_batch=TOKENS_PER_BATCH):
            found = _compare(packed, handle, [kept[row][1] for row in rows], opening)
            shifts.update(zip(rows, found, strict=True))
            if on_progress:
                on_progress(Progress("general prompts", done=len(shifts), total=len(kept), unit="prompts"))
    named = [(prompt, shifts[row]) for row, (prompt, _) in enumerate(kept)]
    return _estimate(named, seed=seed, skipped=len(chosen) - len(kept))


def kl_divergence(base_logits: Tensor, adapted_logits: Tensor) -> Tensor:
    """Return KL(p || q) in nats of two sets of scores over the vocabulary, (n, vocab) each -> (n,) float64.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])).round(decimals=4)
        tensor([0.1201], dtype=torch.float64)
    """
    wide = torch.promote_types(base_logits.dtype, torch.float32)
    log_p = torch.log_softmax(base_logits.to(wide), dim=-1)
    log_q = torch.log_softmax(adapted_logits.to(wide), dim=-1)
    p = log_p.exp()
    # Tokens the base rules out (p = 0, ln p = -inf) add nothing; unguarded they would add 0 * inf = nan.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)


@dataclass(frozen=True)
class _Shift:
    kl_sum: float
    tokens: int
    agreeing: int
    answer_kl_sum: float
    answer_tokens: int


def _encoded(base: LoadedBase, prompts: Sequence[GeneralPrompt]) -> list[tuple[GeneralPrompt, Example]]:
    kept, problems = [], []
    for index, prompt in enumerate(prompts):
        row = RowRef(PROMPTS_FILE, line=index + 1, index=index)
        found = encode(
            _conversation(prompt, row, chat=base.chat_template is not None),
            base.tokenizer,
            chat_template=base.chat_template,
            train_on="assistant",
            max_tokens=base.room,
            overflow="drop",
        )
        if isinstance(found, Example):
            kept.append((prompt, found))
        else:
            problems.append(found)
    if not kept:
        raise DataError(
            f"base '{base.name}' can hold none of the general prompts",
            where={"first": problems[0] if problems else "no prompts given"},
            hint="the chat template or the context length of the base does not allow it",
        )
    return kept


def _conversation(prompt: GeneralPrompt, row: RowRef, *, chat: bool) -> Conversation:
    """The prompt and its answer as turns, or for a base without turns as two lines of plain text."""
    question = prompt.prompt if chat else f"{prompt.prompt}\n"
    messages = (Message("user", question), Message("assistant", prompt.answer))
    return Conversation(messages, row, shape="chat" if chat else "prompt-completion")


def _compare(packed: PackedModel, handle: Handle, examples: list[Example], opening: int) -> list[_Shift]:
    batch = collate(examples)
    input_ids = batch.input_ids.to(next(packed.model.parameters()).device)
    adapted = packed.hidden(input_ids, batch.lengths, prompts=batch.prompts)
    with handle.disabled():
        original = packed.hidden(input_ids, batch.lengths, prompts=batch.prompts)
    positions = _predicting(batch, opening)
    adapted, original = (states[positions.to(input_ids.device)] for states in (adapted, original))
    kls, agreeing = [], []
    both = zip(*(chunks(packed, states, POSITIONS_AT_ONCE) for states in (adapted, original)), strict=True)
    for (rows, adapted_part), (_, original_part) in both:
        count = rows.stop - rows.start
        adapted_logits = packed.logits(adapted_part)[:count]
        with handle.disabled():
            base_logits = packed.logits(original_part)[:count]
        kls.append(kl_divergence(base_logits, adapted_logits))
        agreeing.append(base_logits.argmax(-1) == adapted_logits.argmax(-1))
    return _by_sample(batch, positions, torch.cat(kls).cpu(), torch.cat(agreeing).cpu())


def _shared_opening(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with: what the template writes before the first of them says anything."""
    if len(examples) < 2:
        return 0
    columns = zip(*(example.input_ids for example in examples), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _predicting(batch: PackedBatch, opening: int) -> Tensor:
    """The places of the packed row that predict a token of their own sample, behind the shared opening."""
    keep = torch.ones(batch.tokens, dtype=torch.bool)
    start = 0
    for length in batch.lengths:
        keep[start : start + max(0, opening - 1)] = False
        start += length
        keep[start - 1] = False
    return keep.nonzero()[:, 0]


def _by_sample(batch: PackedBatch, positions: Tensor, kl: Tensor, agreeing: Tensor) -> list[_Shift]:
    samples, count = sample_of(batch, positions), len(batch.lengths)
    in_answer = torch.isin(positions, batch.predict_from)

    def total(values: Tensor) -> list[float]:
        return torch.bincount(samples, weights=values.double(), minlength=count).tolist()

    columns = (kl, torch.ones_like(kl), agreeing, kl * in_answer, in_answer)
    return [
        _Shift(kl_sum, int(tokens), int(agree), answer_kl, int(answer_tokens))
        for kl_sum, tokens, agree, answer_kl, answer_tokens in zip(*map(total, columns), strict=True)
    ]


def _estimate(named: list[tuple[GeneralPrompt, _Shift]], *, seed: int, skipped: int) -> KLEstimate:
    shifts = [shift for _, shift in named]
    tokens = sum(shift.tokens for shift in shifts)
    known = interval_of_ratio([s.kl_sum for s in shifts], [s.tokens for s in shifts], seed=seed)
    return KLEstimate(
        mean=known.value,
        low=None if known.low is None else max(0.0, known.low),
        high=known.high,
        tokens=tokens,
        answer_mean=sum(s.answer_kl_sum for s in shifts) / sum(s.answer_tokens for s in shifts),
        agreement=sum(s.agreeing for s in shifts) / tokens,
        prompts=tuple(PromptShift(p.topic, p.prompt, s.kl_sum, s.tokens, s.agreeing) for p, s in named),
        skipped=skipped,
    )
