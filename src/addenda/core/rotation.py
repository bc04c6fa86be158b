"""Square matrices on a layer's features: how an adapter applies one without forming it, and the orthogonal ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base

__all__ = [
    "FeatureMap",
    "cayley",
    "cayley_neumann",
    "mapped_size",
    "nearest_divisor",
    "skew",
    "times_blocks",
]


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of ``number`` that is nearest to ``wanted``, the smaller one of two.

    Example:
        >>> nearest_divisor(576, 128), nearest_divisor(48, 10), nearest_divisor(20, 32)
        (144, 8, 20)
    """
    lower = max(d for d in range(1, min(wanted, number) + 1) if number % d == 0)
    upper = min((d for d in range(wanted, number + 1) if number % d == 0), default=number)
    return lower if wanted - lower <= abs(upper - wanted) else upper


def skew(upper: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices with these entries above the diagonal, row by row.

    Args:
        upper: (..., size * (size - 1) / 2).
        size: rows of a matrix.

    Returns:
        (..., size, size).
    """
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    half = upper.new_zeros(*upper.shape[:-1], size, size)
    half[..., rows, columns] = upper
    return half - half.mT


def cayley(Q: Tensor) -> Tensor:
    """Return (I + Q) (I - Q)^-1, orthogonal where Q: (..., size, size) is skew-symmetric."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    rotation: Tensor = torch.linalg.solve(eye - Q, eye + Q)
    return rotation


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """Return `cayley` of Q with the inverse's series cut off: (I + Q) (I + Q + ... + Q^(terms - 2)).

    It is orthogonal but for terms of the order of Q^(terms - 1), so only where Q is small.
    """
    power = series = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    for _ in range(terms - 2):
        power = power @ Q
        series = series + power
    return series + series @ Q


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply rows by a block-diagonal matrix.

    Args:
        x: (..., n * size).
        blocks: (n, size, size), or (1, size, size) where all blocks are the same.
    """
    size = blocks.shape[-1]
    parts = torch.unflatten(x, -1, (-1, size))
    if blocks.shape[0] == 1:
        return (parts @ blocks[0]).flatten(-2)
    return torch.einsum("...nb,nbc->...nc", parts, blocks).flatten(-2)


def mapped_size(base: Base) -> int:
    """Return how many features a `FeatureMap` on this layer maps."""
    return base.channels_out if base.channels_in is None else base.d_in


class FeatureMap(Adapter, ABC):
    """Multiplies what goes into the weight by a square matrix R; where that is an index, what comes out.

    y = base(x R) for rows x: (..., d_in);   y = base(x) R for an embedding
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.at_output = base.channels_in is None
        self.reads_weight = not self.at_output and (base.groups > 1 or base.channels_in != base.d_in)

    @abstractmethod
    def map(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """Return x R, or x R^T, for rows x: (..., size), in their dtype."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Return the adapted output, as the contract says."""
        if self.at_output:
            return base.outputs_back(self.map(base.outputs_last(base(x))))
        if not self.reads_weight:
            return base(base.inputs_back(self.map(base.inputs_last(x))))
        # A convolution's input holds each feature once and the weight sees it at every place of the kernel, so the
        # kernel is turned; as a difference, so that an adapter below keeps its part.
        weight = base.weight().to(torch.promote_types(base.dtype, torch.float32))
        return base(x) + base.apply(x, (self.map(weight, transposed=True) - weight).to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the adapted weight and bias, as the contract says."""
        if self.at_output:
            return self.map(weight.t()).t(), None if bias is None else self.map(bias)
        return self.map(weight, transposed=True), bias
