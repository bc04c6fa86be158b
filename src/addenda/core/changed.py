"""A frozen weight with a dense change beside it: y = (W + D) x + b in one autograd node.

It keeps x, and D or what D is made again from (`addenda.core.remaking`), but never the sum, which the plain form keeps
for every layer: in the backward W + D is formed once more.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from addenda.core.remaking import Remade, kept
from addenda.memory.arena import product

__all__ = ["HasWeight", "changed_linear"]


class HasWeight(Protocol):
    """What is asked of the frozen layer."""

    def weight(self) -> Tensor:
        """The weight, (d_out, d_in)."""


def changed_linear(x: Tensor, D: Tensor, bias: Tensor | None, base: HasWeight) -> Tensor:
    """Return (W + D) x + bias.

    Args:
        x: (..., d_in), in the frozen weight's dtype.
        D: (d_out, d_in), any floating dtype at least as wide; its gradient comes in its own.
        bias: (d_out,) in x's dtype, or None.
        base: the frozen layer.

    Returns:
        (..., d_out) in x's dtype.
    """
    y: Tensor = _ChangedLinear.apply(x, D, bias, base, kept(x), kept(D))  # type: ignore[no-untyped-call]
    return y


class _ChangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position only)
        ctx: Any, x: Tensor, D: Tensor, bias: Tensor | None, base: HasWeight, keep_x: Remade, keep_D: Remade
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = product(rows, (base.weight() + D).to(x.dtype).t(), bias)
        ctx.save_for_backward(*keep_x.tensors, *keep_D.tensors)
        ctx.make_x, ctx.make_D, ctx.count = keep_x.make, keep_D.make, len(keep_x.tensors)
        ctx.base, ctx.shape, ctx.dtype = base, x.shape, D.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dD = db = None
        if ctx.needs_input_grad[0]:
            D = ctx.make_D(*saved[ctx.count :])
            dx = product(g, (ctx.base.weight() + D).to(g.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            rows = ctx.make_x(*saved[: ctx.count]).reshape(-1, ctx.shape[-1])
            dD = (g.t() @ rows).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dD, db, None, None, None
