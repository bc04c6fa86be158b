"""The training loss: mean cross-entropy at supervised positions, in chunks, so that full logits never exist.

The scores of a chunk of targets are made, turned into the gradient of the hidden states at once, and dropped; only that
gradient, as large as the states, is kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from addenda.bases.scores import Head, PositionScores, chunks, evaluate_positions, nll_and_gradient

__all__ = ["Head", "PositionScores", "evaluate_positions", "packed_loss"]


def packed_loss(
    head: Head,
    hidden: Tensor,
    predict_from: Tensor,
    targets: Tensor,
    *,
    denominator: float,
    chunk: int | None = None,
) -> Tensor:
    """Return the sum of the targets' cross-entropies, divided by `denominator`.

    Args:
        head: gives the scores, e.g. a packed model.
        hidden: ``(T, d)`` states of a packed row.
        predict_from: ``(N,)`` long, the places in the row whose state predicts a target.
        targets: ``(N,)`` long, the tokens to predict.
        denominator: the trained tokens of the whole global batch, whatever part of it this row is, so that the
            losses of all its rows add up to the mean.
        chunk: targets scored at once, >= 1; None takes as many as make 64 MiB of scores. Bounds the memory, changes
            the result by rounding only.

    Returns:
        A scalar in nats, fp32 or wider. It can be differentiated once, with respect to `hidden` and to whatever in
        the head takes a gradient. Not-a-number in a state or a score comes through.

    Example:
        >>> class Identity:
        ...     def logits(self, hidden):
        ...         return hidden
        >>> packed_loss(Identity(), torch.zeros(3, 4), torch.tensor([0, 1]), torch.tensor([2, 3]), denominator=2)
        tensor(1.3863)
    """
    states = hidden.index_select(0, predict_from)
    if not torch.is_grad_enabled() or not _head_learns(head, states):
        total: Tensor = _ChunkedNll.apply(states, targets, head, chunk)
        return total / denominator
    parts = [
        checkpoint(_nll_sum, head, filled, targets[rows], use_reentrant=False)
        for rows, filled in chunks(head, states, chunk)
    ]
    return torch.stack(parts).sum() / denominator


def _head_learns(head: Head, states: Tensor) -> bool:
    """Whether anything in the head takes a gradient; asked of no rows at all, which costs nothing."""
    return head.logits(states.detach()[:0]).requires_grad


def _nll_sum(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    logits = head.logits(states)[: len(targets)]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, reduction="sum")


class _ChunkedNll(torch.autograd.Function):
    """Sum of cross-entropies whose gradient is made in the forward, chunk by chunk; the head is frozen."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Head, chunk: int | None) -> Tensor:
        total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for rows, filled in chunks(head, states, chunk):
            x = filled.detach().requires_grad_(gradient is not None)
            logits, owned = _scored(head, x)
            real = rows.stop - rows.start
            at_target = functional.pad(targets[rows], (0, len(filled) - real))
            nll, slope = nll_and_gradient(logits.detach(), at_target, owned=owned)
            total += nll[:real].sum()
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(logits, x, slope)[0][:real]
            del logits, slope  # else they would last until the next chunk is made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def _scored(head: Head, x: Tensor) -> tuple[Tensor, bool]:
    """The scores of states ``x``, and whether they may be written over: not the states themselves, not kept."""
    used = {x.untyped_storage().data_ptr()}

    def note(kept: Tensor) -> Tensor:
        used.add(kept.untyped_storage().data_ptr())
        return kept.detach()  # an output of the head would hold the node that keeps it

    with (
        torch.set_grad_enabled(x.requires_grad),
        torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept),
    ):
        logits = head.logits(x)
    return logits, logits.untyped_storage().data_ptr() not in used
