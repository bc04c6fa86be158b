"""How evenly a router uses its experts over a whole step, and which way the router has to move to even it.

experts * sum over e of f_e m_e,   f_e: share of the choices that fell on e,   m_e: mean of p_e,   p = softmax(R x)

With f taken for given, m moves with a row R_i as the mean over tokens of p_e ([i = e] - p_i) x. In the sum over e only
differences of shares are left, (f_i - f_e) p_i p_e x: so for each pair of experts the sum of p_i p_e x is all that has
to be kept of a step's tokens, whatever f turns out to be at its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["counted", "imbalance", "shapes"]


def shapes(experts: int, d_in: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the two sums: ``load``, how often each expert was chosen, and p; ``overlap``, by pairs.

    Example:
        >>> shapes(4, 10)
        ((2, 4), (6, 10))
    """
    return (2, experts), (experts * (experts - 1) // 2, d_in)


def counted(y: Tensor, x: Tensor, p: Tensor, chosen: Tensor, sums: tuple[Tensor, Tensor]) -> Tensor:
    """Return y; in the backward, the tokens of which it has a gradient are added to the sums.

    In the backward, because a forward may be done twice, or for no gradient at all.

    Args:
        y: output of the routed layer, (..., d_out).
        x: the router's input, (..., d_in).
        p: its softmax, (..., experts).
        chosen: 1 for the experts that a token was given to, 0 for others, (..., experts).
        sums: load and overlap, of the shapes that `shapes` tells.
    """
    same: Tensor = _Counted.apply(y, x.detach(), p.detach(), chosen, *sums)  # type: ignore[no-untyped-call]
    return same


def imbalance(router: Tensor, load: Tensor, overlap: Tensor) -> Tensor:
    """Return experts * sum of f_e m_e over the tokens that were counted, at least one; its gradient is the router's."""
    tokens = load[1].sum()  # p of a token adds up to 1
    shares, means = load[0] / load[0].sum(), load[1] / tokens
    first, second = _pairs(len(shares), load.device)
    pull = (shares[first] - shares[second])[:, None] * overlap / tokens
    gradient = torch.zeros_like(router).index_add(0, first, pull).index_add(0, second, -pull)
    moves = ((router - router.detach()) * gradient).sum()
    return len(shares) * ((shares * means).sum() + moves)


def _pairs(experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(experts, experts, 1, device=device)
    return first, second


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position only)
        ctx: Any, y: Tensor, x: Tensor, p: Tensor, chosen: Tensor, load: Tensor, overlap: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, p, chosen)
        ctx.sums = load, overlap
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        load, overlap = ctx.sums
        counts = (g != 0).any(-1).flatten()[:, None]
        x, p, chosen = (saved.flatten(0, -2) for saved in ctx.saved_tensors)
        p, chosen = p * counts, chosen * counts
        load += torch.stack([chosen.sum(0), p.sum(0)])
        first, second = _pairs(p.shape[1], p.device)
        overlap += (p[:, first] * p[:, second]).to(x.dtype).t() @ x
        return g, None, None, None, None, None
