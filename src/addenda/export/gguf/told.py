"""What is wrong with a matrix that is not the one that was meant, in words: the faults that exporters are known for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["differences", "what_is_wrong"]

_CLOSE = 1e-4
"""Norm of a difference, as a share of what was meant, up to which two matrices are the same."""


def differences(
    meant: Mapping[str, Tensor], found: Mapping[str, Tensor], orders: Mapping[str, Tensor]
) -> list[str]:
    """Compare matrices by name; returns a sentence for each that is missing, too much, or another.

    Args:
        meant: what should be there.
        found: what is.
        orders: of those whose rows lie in another order in a file than in the model, that order.
    """
    told = [f"'{name}' is missing" for name in meant if name not in found]
    told += [f"'{name}' is there and should not be" for name in found if name not in meant]
    for name in meant:
        if name in found and not _same(meant[name], found[name]):
            told.append(f"'{name}' {what_is_wrong(name, meant, found[name], orders.get(name))}")
    return told


def what_is_wrong(name: str, meant: Mapping[str, Tensor], found: Tensor, order: Tensor | None) -> str:
    """Return what became of a matrix that is not the one meant: the first of the known faults that explains it."""
    own = meant[name]
    if not bool(found.isfinite().all()):
        return "holds numbers that are not finite"
    if found.shape != own.shape:
        return "is transposed" if found.shape == own.shape[::-1] else f"has the shape {tuple(found.shape)}"
    if order is not None and _same(_unordered(own, order), found):
        return "has its rows in the model's order, not in the file's"
    if order is not None and _same(own, _unordered(found, order)):
        return "has its rows reordered twice"
    if own.shape[0] == own.shape[1] and _same(own.t(), found):
        return "is transposed"
    for other, matrix in meant.items():
        if other != name and matrix.shape == found.shape and _same(matrix, found):
            return f"holds what belongs to '{other}'"
    if not bool(found.any()):
        return "is zero"
    if _same(torch.cat(own.chunk(2)[::-1]), found):
        return "has the halves of its rows exchanged, as gate and up"
    empty = ~found.any(1) & own.any(1)
    if bool(empty.any()) and _same(own * ~empty[:, None], found):
        return f"is zero in {int(empty.sum()):,} of its {len(own):,} rows"
    factor = float((own * found).sum() / (own * own).sum())
    if abs(factor - 1) > _CLOSE and _same(own * factor, found):
        return f"is scaled by {factor:.4g}"
    wrong = int((~torch.isclose(own, found, rtol=1e-4, atol=float(own.abs().max()) * 1e-6)).sum())
    wrong = wrong or int((own != found).sum())
    cosine = float((own * found).sum() / (own.norm() * found.norm()))
    return f"differs in {wrong:,} of {own.numel():,} numbers (cosine {cosine:.3f})"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= _CLOSE * one.norm())


def _unordered(matrix: Tensor, order: Tensor) -> Tensor:
    """The model's rows, as a file has them that did not reorder: read back, they are reordered once too often."""
    return matrix[order]
