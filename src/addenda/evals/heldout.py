"""How well a model predicts the trained tokens of rows, without training on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from addenda.bases.packed import PackedModel, evaluating
from addenda.bases.scores import evaluate_positions
from addenda.core.progress import OnProgress, Progress
from addenda.data.pack import PackedBatch, collate, plan_batches
from addenda.data.rows import Example
from addenda.errors import BaseModelError, DataError
from addenda.evals.results import HeldoutMetrics, RowScore

if TYPE_CHECKING:
    from addenda.bases.loaded import LoadedBase

__all__ = ["TOKENS_PER_BATCH", "HeldoutMetrics", "heldout", "sample_of"]

TOKENS_PER_BATCH = 1024


def heldout(
    base: LoadedBase,
    examples: Sequence[Example],
    *,
    packed: PackedModel | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    chunk: int | None = None,
    task: str = "held-out rows",
    on_progress: OnProgress | None = None,
) -> HeldoutMetrics:
    """Measure nll per token and token accuracy of the model as it is now, adapters and all.

    The model runs in evaluation mode and gets its own mode back afterwards. Scores over the vocabulary exist for
    `chunk` targets at a time, in fp32 or wider.

    Args:
        base: a causal language model.
        examples: encoded rows; their trained tokens count, each once.
        packed: the runner, if one was made already.
        tokens_per_batch: tokens run at once, context included; a longer row runs alone.
        chunk: targets scored at once; None takes as many as make 64 MiB of scores.
        task: name of the step for `on_progress`.
        on_progress: told of the rows done.

    Raises:
        DataError: there are no rows, or rows without a trained token.
        BaseModelError: the model gives a row no finite nll.
    """
    _require_targets(examples)
    packed = packed or PackedModel(base.model)
    device = next(base.model.parameters()).device
    scores: dict[int, RowScore] = {}
    with evaluating(base.model):
        for rows in plan_batches([len(example) for example in examples], tokens_per_batch=tokens_per_batch):
            batch = collate([examples[row] for row in rows])
            hidden = packed.hidden(batch.input_ids.to(device), batch.lengths, prompts=batch.prompts)
            found = evaluate_positions(
                packed, hidden, batch.predict_from.to(device), batch.targets.to(device), chunk=chunk
            )
            scores.update(zip(rows, _row_scores(batch, found.nll.cpu(), found.correct.cpu()), strict=True))
            if on_progress:
                on_progress(Progress(task, done=len(scores), total=len(examples), unit="rows"))
    _require_finite(examples, scores)
    return HeldoutMetrics.of([scores[row] for row in range(len(examples))])


def sample_of(batch: PackedBatch, positions: Tensor) -> Tensor:
    """Return for each position ``(N,)`` of a packed row which of its samples it lies in, ``(N,)`` long."""
    ends = torch.tensor(batch.lengths).cumsum(0)
    return torch.searchsorted(ends, positions, right=True)


def _row_scores(batch: PackedBatch, nll: Tensor, correct: Tensor) -> list[RowScore]:
    samples, count = sample_of(batch, batch.predict_from), len(batch.lengths)
    sums = torch.bincount(samples, weights=nll.double(), minlength=count).tolist()
    hits = torch.bincount(samples, weights=correct.double(), minlength=count).tolist()
    tokens = torch.bincount(samples, minlength=count).tolist()
    return [RowScore(*row) for row in zip(sums, tokens, map(int, hits), strict=True)]


def _require_finite(examples: Sequence[Example], scores: Mapping[int, RowScore]) -> None:
    bad = [row for row in sorted(scores) if not math.isfinite(scores[row].nll_sum)]
    if bad:
        raise BaseModelError(
            f"the model gives {len(bad)} of {len(scores)} rows no finite nll",
            where={"first": str(examples[bad[0]].row)},
            hint="its weights are damaged, or too large for their number format: try base.dtype=float32",
        )


def _require_targets(examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("there are no rows to measure on", hint="give at least one row with an answer")
    without = [str(example.row) for example in examples if not example.trained_tokens]
    if without:
        raise DataError(
            f"{len(without)} rows have no trained token, so there is nothing to measure on them",
            where={"rows": ", ".join(without[:5])},
            hint="leave them out, or check what the loss mask keeps",
        )
