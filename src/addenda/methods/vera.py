"""VeRA: one frozen random pair of factors for all layers, scaled by vectors of each layer's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Method, ParameterSource
from addenda.core.products import FrozenPair, ProductAdapter
from addenda.core.ranges import integer, number
from addenda.core.registry import register

__all__ = ["VeRA"]


@register("vera")
@dataclass(frozen=True)
class VeRA(Method):
    """Low-rank update from random matrices that all layers share: train two vectors a layer.

    y = base(x) + b * (B (d * (A x))),   A: (rank, d_in),  B: (d_out, rank),  d: (rank,),  b: (d_out,)

    A and B are frozen, drawn once (Kaiming-uniform) as large as the largest layer asks, and cut to each layer's size.
    b starts at zero, so the adapted layer starts equal to its base. Mergeable exactly into an unquantized weight.
    Parameters: rank + d_out per layer.

    Args:
        rank: inner dimension, >= 1. It costs no trained matrix, so it is larger than LoRA's: the paper takes 256 to
            1024.
        d_initial: initial value of d, > 0.

    Differs from: the paper draws A and B anew from a seed that is kept; here, as in PEFT by default, they are saved
    with the adapter, because a generator's numbers are not promised to stay the same.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, VeRA(rank=2)).trainable_parameters
        16

    References: Kopiczko et al. 2023, arXiv:2310.11454, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 6, "d_initial": 0.5},)

    rank: int = 256
    """Inner dimension of the update."""
    d_initial: float = 0.1
    """Initial value of the inner vector."""

    def problems(self) -> list[str]:
        return integer("rank", self.rank) + number("d_initial", self.d_initial, above=0.0)

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        d_in, d_out = max(base.d_in for base in bases), max(base.d_out for base in bases)
        return FrozenPair(
            source.constant(self.rank, d_in, init=kaiming_uniform),
            source.constant(d_out, self.rank, init=kaiming_uniform),
        )

    def build(self, base: Base) -> VeRAAdapter:
        d = base.parameter(self.rank, init=self.d_initial)
        return VeRAAdapter(d, base.parameter(base.d_out), d_in=base.d_in)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a (rows, columns) matrix uniformly within +-sqrt(6 / columns), rounded as PEFT rounds that."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(tensor.shape[1]))
    tensor.uniform_(-bound, bound, generator=generator)


class VeRAAdapter(ProductAdapter):
    """d: (rank,), b: (d_out,)."""

    common: FrozenPair

    def __init__(self, d: nn.Parameter, b: nn.Parameter, *, d_in: int) -> None:
        super().__init__()
        self.d, self.b, self.d_in = d, b, d_in

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        A, B = self.common.A[:, : self.d_in], self.common.B[: len(self.b)]
        return self.d[:, None] * A, self.b[:, None] * B, 1.0
