"""The start of LoRA's paper: A Gaussian, B zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.starts import Start, start
from addenda.methods.starts.kaiming import zero_factor

__all__ = ["Gaussian"]


@start("gaussian")
@dataclass(frozen=True)
class Gaussian(Start):
    """A0 normal with standard deviation 1 / rank, B0 zero.

    The paper leaves the deviation open; this is the one that PEFT's start of the same name has.

    References: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        B = zero_factor(base, rank)
        return torch.randn(rank, base.d_in, dtype=B.dtype, generator=generator) / rank, B
