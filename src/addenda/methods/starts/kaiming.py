"""The usual start: A uniform as a linear layer's own weight, B zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.contract import Base
from addenda.core.starts import Start, start

__all__ = ["Kaiming", "zero_factor"]


@start("kaiming")
@dataclass(frozen=True)
class Kaiming(Start):
    """A0 uniform in +-1 / sqrt(d_in), B0 zero: what LoRA's official code does.

    References: Hu et al. 2021, arXiv:2106.09685 (whose text has a Gaussian); He et al. 2015, arXiv:1502.01852.
    """

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        B = zero_factor(base, rank)
        A = torch.empty(rank, base.d_in, dtype=B.dtype)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return A, B


def zero_factor(base: Base, rank: int) -> Tensor:
    """Return a B (d_out, rank) of zeros, as wide as parameters are."""
    return torch.zeros(base.d_out, rank, dtype=torch.promote_types(base.dtype, torch.float32))
