"""Frozen linear layers on one input with low-rank terms on them, as one autograd node.

Queries, keys and values share their input, and so do gate and up. Together they cost one thin product with their
stacked A where each alone costs its own, one gradient of the input instead of three that are added up, and one input
kept for the backward, or none where it can be made again (`addenda.core.remaking`). A term may hold for some rows only,
so that rows of one batch have adapters of their own and still share the frozen products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from addenda.core.lowrank import FrozenLinear, add_scaled
from addenda.core.remaking import Remade, kept
from addenda.memory.arena import empty, product

__all__ = [
    "Addend",
    "Term",
    "Terms",
    "factors_of",
    "linear_with_terms",
    "terms_factor_grads",
    "terms_forward",
    "terms_input_grad",
]


class Addend(NamedTuple):
    """scaling B A x, added to some rows."""

    A: Tensor
    """``(rank, d_in)``."""
    B: Tensor
    """``(d_out, rank)``."""
    scaling: float
    rows: tuple[int, int] | None = None
    """First row and the one after the last; None for all."""


@dataclass(frozen=True)
class Term:
    """One frozen layer and the low-rank terms on it: y = W x + b + scaling B A x.

    Where the layer's weight holds them already, rounded, they are not added: the rounding passes their gradient on.
    """

    base: FrozenLinear
    parts: tuple[Addend, ...] = ()
    host: Any = None
    """The layer as a host, if it is one."""
    within: bool = False
    """Whether the terms are in the weight of ``base`` already."""


class _Span(NamedTuple):
    """The parts of several terms that hold for the same rows, their ranks side by side.

    First those that are added to the layer's output, then those that are within its weight.
    """

    rows: slice
    parts: tuple[tuple[int, Addend, slice], ...]
    """Place of the term, its part, and where its ranks lie."""
    added: int
    """The sum of the ranks that are added."""

    @property
    def rank(self) -> int:
        return int(self.parts[-1][2].stop)

    def stacked(self, dtype: torch.dtype, ranks: int) -> Tensor:
        """The A of the parts with the first ranks, one under another, (ranks, d_in)."""
        every = [part.A for _, part, place in self.parts if place.stop <= ranks]
        return (every[0] if len(every) == 1 else torch.cat(every)).to(dtype)


class Terms(tuple[Term, ...]):
    """Terms of one node; what its passes look up of them is worked out once."""

    @functools.cached_property
    def spans(self) -> list[_Span]:
        """The parts of all terms by the rows for which they hold."""
        by_rows: dict[tuple[int, int] | None, list[tuple[int, Addend]]] = {}
        for place, term in sorted(enumerate(self), key=lambda each: each[1].within):
            for part in term.parts:
                by_rows.setdefault(part.rows, []).append((place, part))
        return [
            _Span(
                slice(*rows) if rows else slice(None),
                _side_by_side(parts),
                sum(len(part.A) for place, part in parts if not self[place].within),
            )
            for rows, parts in by_rows.items()
        ]


def _side_by_side(parts: Sequence[tuple[int, Addend]]) -> tuple[tuple[int, Addend, slice], ...]:
    ends = itertools.accumulate(len(part.A) for _, part in parts)
    return tuple(
        (place, part, slice(end - len(part.A), end)) for end, (place, part) in zip(ends, parts, strict=True)
    )


def factors_of(terms: Sequence[Term]) -> list[Tensor]:
    """Return A and B of every part in turn: what a node on these terms is to be given, so that they get gradients."""
    return [factor for term in terms for part in term.parts for factor in part[:2]]


def terms_forward(rows: Tensor, terms: Terms) -> tuple[list[Tensor], Tensor]:
    """rows: (n, d_in) -> each term's output (n, d_out), and A x of the parts: (n, largest sum of ranks on a row)."""
    spans = terms.spans
    outputs = [term.base.linear(rows) for term in terms]
    if not spans:
        return outputs, rows.new_empty(len(rows), 0)
    whole = len(spans) == 1 and spans[0].rows == slice(None)
    h = None if whole else rows.new_zeros(len(rows), max(span.rank for span in spans))
    for span in spans:
        inner = product(rows[span.rows], span.stacked(rows.dtype, span.rank).t())
        if h is not None:
            h[span.rows, : span.rank] = inner
        for place, part, ranks in span.parts:
            if not terms[place].within:
                add_scaled(outputs[place][span.rows], inner[:, ranks], part.B.to(rows.dtype), part.scaling)
        if h is None:
            h = inner
    assert h is not None
    return outputs, h


def terms_input_grad(
    grads: Sequence[Tensor | None], terms: Terms, *, wanted: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Return the gradient of the rows, (n, d_in) or None, and g B of the parts, as wide as `terms_forward`'s A x.

    Args:
        grads: the gradient of each term's output, (n, d_out); None where an output was not used.
        terms: the terms.
        wanted: whether the gradient of the rows is asked for.
    """
    spans = terms.spans
    some = next(g for g in grads if g is not None)
    inner = empty((len(some), max((span.rank for span in spans), default=0)), some)
    for span in spans:
        for place, part, ranks in span.parts:
            g, out = grads[place], inner[span.rows, ranks]
            if g is None:
                out.zero_()
            else:
                torch.mm(g[span.rows], (part.B * part.scaling).to(g.dtype), out=out)
    total: Tensor | None = None
    for g, term in zip(grads, terms, strict=True):
        if g is not None and wanted:
            total = term.base.grad_input(g) if total is None else term.base.add_grad_input(total, g)
    if total is not None:
        for span in spans:
            if span.added:
                added = inner[span.rows, : span.added]
                total[span.rows].addmm_(added, span.stacked(inner.dtype, span.added))
    return total, inner


def terms_factor_grads(
    grads: Sequence[Tensor | None], inner: Tensor, rows: Tensor | None, h: Tensor, terms: Terms
) -> list[Tensor | None]:
    """Return the gradients of what `factors_of` gives, in its order; None where a term's output was not used.

    Args:
        grads: as for `terms_input_grad`, which gave
        inner: (n, ranks).
        rows: the input, (n, d_in); None where no A is trained.
        h: A x as `terms_forward` gave it, (n, ranks).
        terms: the terms.
    """
    found: dict[int, list[Tensor | None]] = {place: [] for place in range(len(terms))}
    for span in terms.spans:
        grad_A = None if rows is None else inner[span.rows, : span.rank].t() @ rows[span.rows]
        for place, part, ranks in span.parts:
            g = grads[place]
            if g is None:
                found[place] += [None, None]
                continue
            # With the long operand on the right the product runs up to twice as fast as the other way round.
            grad_B = (h[span.rows, ranks].t() @ g[span.rows]).t().to(part.B.dtype).mul_(part.scaling)
            found[place] += [None if grad_A is None else grad_A[ranks].to(part.A.dtype), grad_B]
    return [grad for factors in found.values() for grad in factors]


def linear_with_terms(x: Tensor, terms: Sequence[Term]) -> tuple[Tensor, ...]:
    """Return what each frozen layer with its terms gives for ``x``, in one node.

    Args:
        x: ``(..., d_in)``; rows are counted over all dimensions but the last.
        terms: layers of the same input width.

    Returns:
        ``(..., d_out)`` of each.
    """
    made: tuple[Tensor, ...] = _LinearWithTerms.apply(x, Terms(terms), kept(x), *factors_of(terms))  # type: ignore[no-untyped-call]
    return made


class _LinearWithTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, terms: Terms, keep: Remade, *factors: Any) -> Any:
        outputs, h = terms_forward(x.reshape(-1, x.shape[-1]), terms)
        # Without an A to train nothing of the input is needed again.
        ctx.save_for_backward(h, *(keep.tensors if any(ctx.needs_input_grad[3::2]) else ()))
        ctx.terms, ctx.make, ctx.shape = terms, keep.make, x.shape
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        h, *ingredients = ctx.saved_tensors
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        dx, inner = terms_input_grad(flat, ctx.terms, wanted=ctx.needs_input_grad[0])
        rows = ctx.make(*ingredients).reshape(-1, ctx.shape[-1]) if ingredients else None
        factors = terms_factor_grads(flat, inner, rows, h, ctx.terms)
        return (None if dx is None else dx.view(ctx.shape)), None, None, *factors
