"""Several frozen linear layers on one input, each with at most one low-rank adapter, as one autograd node.

Queries, keys and values share their input, and so do gate and up. Together they cost one thin product with their
stacked A where each alone costs its own, one gradient of the input instead of three that are added up, and one input
kept for the backward, or none where it can be made again (`addenda.core.remaking`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addenda.core.contract import Adapter
from addenda.core.host import Host, compositions_on, count_call
from addenda.core.lowrank import FrozenLinear, add_scaled
from addenda.core.packed_layers import PackedLinear, PackedView
from addenda.core.remaking import Remade, kept
from addenda.core.views import LinearView
from addenda.memory.arena import empty, product

__all__ = [
    "Term",
    "shared_linear",
    "term_of",
    "terms_factor_grads",
    "terms_forward",
    "terms_input_grad",
]


@dataclass(frozen=True)
class Term:
    """One frozen layer and the low-rank term on it: y = W x + b + scaling B A x."""

    base: FrozenLinear
    A: Tensor | None = None
    """``(rank, d_in)``; None where the layer has no adapter."""
    B: Tensor | None = None
    """``(d_out, rank)``."""
    scaling: float = 1.0
    host: Host | None = None
    """The layer as a host, if it is one."""

    @property
    def rank(self) -> int:
        """Rank of the term; 0 where there is none."""
        return 0 if self.A is None else len(self.A)


def term_of(module: nn.Module, x: Tensor) -> Term | None:
    """Return what the layer computes for ``x`` as a term, or None where only calling it would do the same."""
    view = module._addenda.view if isinstance(module, Host) else _plain_view(module)
    if not isinstance(view, LinearView) or not view.fusible(x) or _is_watched(module):
        return None
    if not isinstance(module, Host):
        return Term(view)
    acting = compositions_on(module)
    if not acting:
        return Term(view, host=module)
    found = acting[0].term(cast(Mapping[str, Adapter], module.adapters)) if len(acting) == 1 else None
    return None if found is None else Term(view, *found, host=module)


def _plain_view(module: nn.Module) -> LinearView | None:
    if type(module) is nn.Linear:
        # A tensor subclass, as of torchao, is a weight format whose own products are to be used.
        return LinearView(module, "") if type(module.weight) is nn.Parameter else None
    return PackedView(module, "") if isinstance(module, PackedLinear) else None


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else's hook wants to see the layer being called."""
    before = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    own = getattr(module, "_addenda_hook", None)
    after = [key for key in module._forward_hooks if own is None or key != own.id]
    return bool(before or after or "forward" in vars(module))


# ---------------------------------------------------------------------------------------------- the products themselves


def terms_forward(rows: Tensor, terms: Sequence[Term]) -> tuple[list[Tensor], Tensor]:
    """rows: (n, d_in) -> each term's output (n, d_out), and the stacked A x: (n, sum of ranks)."""
    adapted = [term for term in terms if term.A is not None]
    if not adapted:
        return [term.base.linear(rows) for term in terms], rows.new_empty(len(rows), 0)
    h = product(rows, stacked(adapted, rows.dtype).t())
    outputs = []
    for term, span in zip(terms, _spans(terms), strict=True):
        y = term.base.linear(rows)
        if term.B is not None:
            y = add_scaled(y, h[:, span], term.B.to(rows.dtype), term.scaling)
        outputs.append(y)
    return outputs, h


def stacked(adapted: Sequence[Term], dtype: torch.dtype) -> Tensor:
    """The A of all terms, one under another, (sum of ranks, d_in)."""
    parts = [term.A for term in adapted if term.A is not None]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def terms_input_grad(
    grads: Sequence[Tensor | None], terms: Sequence[Term], *, wanted: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Return the gradient of the rows, (n, d_in) or None, and g B of each adapted term, (n, sum of ranks).

    Args:
        grads: the gradient of each term's output, (n, d_out); None where an output was not used.
        terms: the terms.
        wanted: whether the gradient of the rows is asked for.
    """
    some = next(g for g in grads if g is not None)
    adapted = [term for term in terms if term.A is not None]
    inner = empty((len(some), sum(term.rank for term in terms)), some)
    total: Tensor | None = None
    for g, term, span in zip(grads, terms, _spans(terms), strict=True):
        if g is None:
            inner[:, span] = 0
            continue
        if term.B is not None:
            torch.mm(g, (term.B * term.scaling).to(g.dtype), out=inner[:, span])
        if wanted:
            total = term.base.grad_input(g) if total is None else term.base.add_grad_input(total, g)
    if total is not None and adapted:
        total.addmm_(inner, stacked(adapted, inner.dtype))
    return total, inner


def terms_factor_grads(
    grads: Sequence[Tensor | None], inner: Tensor, rows: Tensor, h: Tensor, terms: Sequence[Term]
) -> list[Tensor | None]:
    """Return the gradients of A and B of each term in turn, None where a term has none.

    Args:
        grads: as for `terms_input_grad`, which gave
        inner: (n, sum of ranks).
        rows: the input, (n, d_in).
        h: the stacked A x, (n, sum of ranks).
        terms: the terms.
    """
    grad_A = inner.t() @ rows if inner.shape[1] else None
    factors: list[Tensor | None] = []
    for g, term, span in zip(grads, terms, _spans(terms), strict=True):
        if term.A is None or term.B is None or g is None or grad_A is None:
            factors += [None, None]
            continue
        # With the long operand on the right the product runs up to twice as fast as the other way round.
        grad_B = (h[:, span].t() @ g).t().to(term.B.dtype).mul_(term.scaling)
        factors += [grad_A[span].to(term.A.dtype), grad_B]
    return factors


def _spans(terms: Sequence[Term]) -> list[slice]:
    """Where each term lies among the stacked ranks."""
    ends = list(itertools.accumulate(term.rank for term in terms))
    return [slice(end - term.rank, end) for end, term in zip(ends, terms, strict=True)]


# --------------------------------------------------------------------------------------------------------- the node


def shared_linear(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Return what each of the layers gives for ``x``, in one node where all of them are frozen or low-rank adapted.

    Args:
        modules: layers of the same input width; hosts, or plain layers.
        x: ``(..., d_in)``.

    Returns:
        ``(..., d_out)`` of each layer.
    """
    terms = [term_of(module, x) for module in modules]
    found = [term for term in terms if term is not None]
    if len(found) < len(terms):
        return tuple(module(x) for module in modules)
    for term in found:
        count_call(term.host)
    factors = [factor for term in found for factor in (term.A, term.B)]
    outputs: tuple[Tensor, ...] = _SharedLinear.apply(x, tuple(found), kept(x), *factors)  # type: ignore[no-untyped-call]
    return outputs


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, terms: tuple[Term, ...], keep: Remade, *factors: Any) -> Any:
        outputs, h = terms_forward(x.reshape(-1, x.shape[-1]), terms)
        # Without an adapter nothing of the input is needed again.
        ctx.save_for_backward(h, *(keep.tensors if h.shape[1] else ()))
        ctx.terms, ctx.make, ctx.shape = terms, keep.make, x.shape
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        h, *ingredients = ctx.saved_tensors
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        dx, inner = terms_input_grad(flat, ctx.terms, wanted=ctx.needs_input_grad[0])
        factors: list[Tensor | None] = [None] * (2 * len(ctx.terms))
        if ingredients:
            rows = ctx.make(*ingredients).reshape(-1, ctx.shape[-1])
            factors = terms_factor_grads(flat, inner, rows, h, ctx.terms)
        return (None if dx is None else dx.view(ctx.shape)), None, None, *factors
