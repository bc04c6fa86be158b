"""What the output head says at chosen positions: the cross-entropy of each target and whether it came first.

For n targets and a vocabulary of V the usual way holds n x V scores, their fp32 copy and their gradient at once. Here
scores exist for one chunk of targets at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CHUNK", "Head", "PositionScores", "evaluate_positions", "nll_and_probabilities"]

CHUNK = 256
"""Targets scored at once; with a vocabulary of 49,152 their scores take 24 MiB in bf16 and 48 in fp32."""


class Head(Protocol):
    """What turns hidden states into scores over the vocabulary; `PackedModel` is one."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (n, d) -> (n, vocab)."""


@dataclass(frozen=True)
class PositionScores:
    """The head's verdict on each target, in the order of the targets."""

    nll: Tensor
    """``(N,)`` cross-entropy in nats, fp32 or wider."""
    correct: Tensor
    """``(N,)`` bool: no other token scored higher."""

    @property
    def nll_sum(self) -> float:
        """Sum of the cross-entropies, in nats."""
        return float(self.nll.sum(dtype=torch.float64))

    @property
    def correct_count(self) -> int:
        """Number of targets that came first."""
        return int(self.correct.sum())


@torch.no_grad()
def evaluate_positions(
    head: Head, hidden: Tensor, predict_from: Tensor, targets: Tensor, *, chunk: int = CHUNK
) -> PositionScores:
    """Score targets without gradient.

    Args:
        head: gives the scores, e.g. a packed model.
        hidden: ``(T, d)`` states of a packed row.
        predict_from: ``(N,)`` long, the places in the row whose state predicts a target.
        targets: ``(N,)`` long, the tokens to predict.
        chunk: targets scored at once, >= 1.

    Example:
        >>> class Identity:
        ...     def logits(self, hidden):
        ...         return hidden
        >>> scores = evaluate_positions(Identity(), torch.eye(3), torch.tensor([0, 1]), torch.tensor([0, 2]))
        >>> scores.nll, scores.correct_count
        (tensor([0.5514, 1.5514]), 1)
    """
    nll, correct = [hidden.new_empty(0, dtype=_wide(hidden))], [targets.new_empty(0, dtype=torch.bool)]
    states = hidden.index_select(0, predict_from)
    for x, y in zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True):
        part, probabilities = nll_and_probabilities(head.logits(x), y)
        nll.append(part)
        correct.append(probabilities.gather(1, y[:, None])[:, 0] >= probabilities.amax(1))
    return PositionScores(torch.cat(nll), torch.cat(correct))


def nll_and_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies ``(n,)`` and the softmax ``(n, vocab)`` of scores, both in fp32 or wider."""
    scores = logits.to(_wide(logits))
    probabilities = torch.softmax(scores, dim=-1)
    # log-sum-exp from the softmax already made: at the highest score, p >= 1 / vocab, so its logarithm is exact.
    log_sum = scores.amax(1) - probabilities.amax(1).log()
    return log_sum - scores.gather(1, targets[:, None])[:, 0], probabilities


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
