"""What the output head says at chosen positions: the cross-entropy of each target and whether it came first.

For n targets and a vocabulary of V the usual way holds n x V scores, their fp32 copy and their gradient at once. Here
scores exist for one chunk of targets at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from addenda.bases.fast.compiled import compiled_on_gpu
from addenda.kernels import calls

__all__ = ["Head", "PositionScores", "chunk_bytes", "chunks", "evaluate_positions", "nll_and_gradient"]

CHUNK_BYTES, GPU_CHUNK_BYTES = 64 * 2**20, 256 * 2**20
"""Scores held at once. Each chunk reads the whole output head, so small chunks are slow; a GPU needs more rows to be
kept busy."""

ROW_MULTIPLE = 64
"""On a CPU every new number of rows costs the product with the head a set-up of several milliseconds."""

SURE = 1e-30
"""Probabilities below this lose digits; the cross-entropy is then made from the scores."""


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
    head: Head, hidden: Tensor, predict_from: Tensor, targets: Tensor, *, chunk: int | None = None
) -> PositionScores:
    """Score targets without gradient.

    Args:
        head: gives the scores, e.g. a packed model.
        hidden: ``(T, d)`` states of a packed row.
        predict_from: ``(N,)`` long, the places in the row whose state predicts a target.
        targets: ``(N,)`` long, the tokens to predict.
        chunk: targets scored at once, >= 1; None takes as many as make 64 MiB of scores.

    Example:
        >>> class Identity:
        ...     def logits(self, hidden):
        ...         return hidden
        >>> scores = evaluate_positions(Identity(), torch.eye(3), torch.tensor([0, 1]), torch.tensor([0, 2]))
        >>> scores.nll, scores.correct_count
        (tensor([0.5514, 1.5514]), 1)
    """
    states = hidden.index_select(0, predict_from)
    nll = states.new_empty(len(states), dtype=_wide(states))
    correct = torch.empty_like(targets, dtype=torch.bool)
    for rows, filled in chunks(head, states, chunk):
        logits = head.logits(filled)[: rows.stop - rows.start]
        nll[rows], correct[rows] = _nll_and_first(logits, targets[rows])
    return PositionScores(nll, correct)


def chunk_bytes(*, on_gpu: bool) -> int:
    """Return how many bytes of scores exist at once.

    Example:
        >>> chunk_bytes(on_gpu=False) == CHUNK_BYTES
        True
    """
    return GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES


def chunks(head: Head, states: Tensor, chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Cut ``(n, d)`` states into parts of about equal size, of `chunk` rows or `CHUNK_BYTES` of scores at most.

    Yields:
        The part's place in `states`, and its states filled up with zeros to a multiple of `ROW_MULTIPLE` rows (or to
        `chunk`), so that the head's products keep to a few shapes.
    """
    if chunk is None:
        # No rows cost nothing, and show the vocabulary.
        row = head.logits(states.detach()[:0])
        chunk = max(1, chunk_bytes(on_gpu=row.is_cuda) // (row.shape[-1] * row.element_size()))
    multiple = ROW_MULTIPLE if chunk >= ROW_MULTIPLE else 1
    chunk -= chunk % multiple
    parts = math.ceil(len(states) / chunk)
    size = multiple * math.ceil(len(states) / parts / multiple) if parts else 1
    for first in range(0, len(states), size):
        rows = slice(first, min(first + size, len(states)))
        yield rows, functional.pad(states[rows], (0, 0, 0, first + size - rows.stop))


def nll_and_gradient(logits: Tensor, targets: Tensor, *, owned: bool) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies ``(n,)``, fp32 or wider, and their sum's gradient ``(n, vocab)`` in the scores' dtype.

    Args:
        logits: ``(n, vocab)`` scores, free of autograd.
        targets: ``(n,)`` long.
        owned: nobody else needs the scores again: the gradient may be written over them.
    """
    if calls.usable(logits):
        gradient = logits if owned else logits.clone()
        return calls.cross_entropy(gradient, targets, gradient=True)[0], gradient
    nll, gradient = _nll_and_probabilities(logits, targets)
    minus_one = gradient.new_full((len(targets), 1), -1.0)
    return nll, gradient.scatter_add_(1, targets[:, None], minus_one)


def _nll_and_first(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropies, and whether no other score is higher than the target's."""
    if calls.usable(logits):
        return calls.cross_entropy(logits, targets, gradient=False)
    nll, probabilities = _nll_and_probabilities(logits.to(_wide(logits)), targets)
    return nll, probabilities.gather(1, targets[:, None])[:, 0] >= probabilities.amax(1)


def _nll_and_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.device.type != "cpu":
        return _by_log_sum(logits, targets)
    # Scores in bf16 give each cross-entropy to about 0.002 nats, without bias: less than their own rounding makes.
    probabilities = torch.softmax(logits, dim=-1)
    chosen = probabilities.gather(1, targets[:, None])[:, 0].to(_wide(logits))
    nll = -chosen.log()
    lost = chosen < SURE
    if lost.any():
        wide = logits[lost].to(nll.dtype)
        nll[lost] = wide.logsumexp(1) - wide.gather(1, targets[lost, None])[:, 0]
    return nll, probabilities


@compiled_on_gpu
def _by_log_sum(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one pass and one more, which never asks a number back from the device."""
    wide = logits.to(_wide(logits))
    log_sum = wide.logsumexp(1, keepdim=True)
    return (log_sum - wide.gather(1, targets[:, None]))[:, 0], (wide - log_sum).exp().to(logits.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
