"""What methods share whose update is a product of two factors: how it runs, folds and begins, and a frozen pair."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base

__all__ = ["FrozenPair", "ProductAdapter", "kaiming_uniform"]


class ProductAdapter(Adapter):
    """Adds scaling * B A x, with factors that a subclass makes of what it trains, anew for each call."""

    additive = True

    @abstractmethod
    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        """Return A (k, d_in), B (d_out, k) and the scaling."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.add_low_rank(x, *self.low_rank_term())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, scaling = self.low_rank_term()
        return weight + scaling * (B.to(weight.dtype) @ A.to(weight.dtype)), bias


class FrozenPair(nn.Module):
    """A and B, frozen, that all layers share: as large as the largest layer asks, of which each takes its part."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix with U(-k, k), k = 1 / sqrt(columns): how a factor begins that reads a layer's input."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
