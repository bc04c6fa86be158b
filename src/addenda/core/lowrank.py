"""The fused low-rank linear: y = W x + s B A x in one autograd node.

It saves A x, and x (or what x is made again from) where A is trained; it never forms W + s B A, never makes a gradient
for W, and needs only two operations of the frozen weight (``linear`` and ``grad_input``), so it works on any weight
format that offers them. The thin products come first: x Aᵀ has ``rank`` columns, so the extra cost is 2 * rank *
(d_in + d_out) FLOP per row and direction.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from addenda.core.remaking import remade_of
from addenda.errors import TrainingError
from addenda.memory.arena import product

__all__ = ["FrozenLinear", "add_scaled", "frozen_linear", "low_rank_linear"]


class FrozenLinear(Protocol):
    """The operations the fused path needs of a frozen weight."""

    def linear(self, x: Tensor) -> Tensor:
        """x: (n, d_in) -> W x + b: (n, d_out)."""

    def grad_input(self, g: Tensor) -> Tensor:
        """g: (n, d_out) -> Wᵀ g: (n, d_in)."""

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        """Add Wᵀ g to ``total`` (n, d_in) in place, and return it."""


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position only)
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, base: FrozenLinear
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        A_, B_ = A.to(x.dtype), B.to(x.dtype)
        h = product(rows, A_.t())
        y = add_scaled(base.linear(rows), h, B_, scaling)
        remade = remade_of(x)
        # The input is needed again for the gradient of A alone, so with a frozen A it is not kept.
        ingredients = (remade.tensors if remade else (x,)) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(h, A, B, *ingredients)
        ctx.base, ctx.scaling, ctx.shape, ctx.make = base, scaling, x.shape, remade.make if remade else None
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, A, B, *ingredients = ctx.saved_tensors
        x = ctx.make(*ingredients) if ctx.make and ingredients else next(iter(ingredients), None)
        rows = h.new_empty(0) if x is None else x.reshape(-1, x.shape[-1])
        A_, B_ = A.to(h.dtype), B.to(h.dtype)
        if torch.is_grad_enabled():  # for a second derivative, h has to know where it comes from
            if ctx.make or x is None:
                raise TrainingError(
                    "a layer that does not keep its input gives no second derivative",
                    hint="take derivatives of derivatives outside addenda.lean, and of a method that trains its A",
                )
            h = rows @ A_.t()
        g = grads[0].reshape(-1, grads[0].shape[-1])
        gB = (g @ B_).mul_(ctx.scaling)
        dx = dA = dB = None
        if ctx.needs_input_grad[1]:
            dA = (gB.t() @ rows).to(A.dtype)
        if ctx.needs_input_grad[2]:
            dB = (h.t() @ g).t().to(B.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx = ctx.base.grad_input(g).addmm_(gB, A_).view(ctx.shape)
        return dx, dA, dB, None, None


def add_scaled(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Add scaling * h Bᵀ to y in place.

    One operation rounds once, where PEFT rounds the scaled product before it is added. With a power of two that is
    the same; with another scaling in float32 the last bits would differ, and a deep model makes 1e-4 of a logit of it.
    """
    if y.dtype == torch.float32 and math.frexp(scaling)[0] != 0.5:
        return y.add_((h @ B.t()).mul_(scaling))
    return y.addmm_(h, B.t(), alpha=scaling)


def low_rank_linear(x: Tensor, A: Tensor, B: Tensor, *, scaling: float, base: FrozenLinear) -> Tensor:
    """Return W x + b + scaling * B A x.

    Args:
        x: (..., d_in), in the frozen weight's dtype.
        A: (rank, d_in), any floating dtype; used in x's, its gradient comes in its own.
        B: (d_out, rank), likewise.
        scaling: factor of the low-rank part, dimensionless.
        base: the frozen weight.

    Returns:
        (..., d_out) in x's dtype.
    """
    y: Tensor = _LowRankLinear.apply(x, A, B, scaling, base)  # type: ignore[no-untyped-call]
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenLinear) -> Tensor:
        ctx.base = base
        y = base.linear(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        dx = ctx.base.grad_input(g.reshape(-1, g.shape[-1]))
        return dx.view(*g.shape[:-1], dx.shape[-1]), None


def frozen_linear(x: Tensor, base: FrozenLinear) -> Tensor:
    """Return W x + b, differentiable once in ``x`` and in nothing else; the forward of a packed layer.

    Args:
        x: (..., d_in), in the frozen weight's dtype.
        base: the frozen weight.

    Returns:
        (..., d_out) in x's dtype.
    """
    y: Tensor = _FrozenLinear.apply(x, base)  # type: ignore[no-untyped-call]
    return y
