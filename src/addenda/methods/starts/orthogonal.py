"""Orthogonal start: both factors random and of full size, with a product of zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.starts import Start, start

__all__ = ["Orthogonal"]


@start("orthogonal")
@dataclass(frozen=True)
class Orthogonal(Start):
    """Random factors whose inner halves are orthogonal, so that both learn from the first step.

    A0 = Q1^T G_A / 10,   B0 = G_B Q2 / 10,   Q1, Q2: every other row of a random orthogonal (rank, rank) matrix

    G_A (rank / 2, d_in) and G_B (d_out, rank / 2) are Gaussian, and Q2 Q1^T = 0 makes B0 A0 zero. The rank must be
    even. In a base of 16 bits the product of the rounded factors is zero to rounding only.

    References: there is no paper; the construction is of a note that PEFT's start of the same name goes back to,
    https://datta0.github.io/posts/rethink-lora-init/.
    """

    def problems_at(self, base: Base, rank: int) -> list[str]:
        return [f"start 'orthogonal' needs an even rank, got {rank}"] if rank % 2 else []

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(base.dtype, torch.float32)

        def gaussian(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=dtype, generator=generator)

        Q = torch.linalg.qr(gaussian(rank, rank)).Q
        A = Q[0::2].t() @ gaussian(rank // 2, base.d_in)
        return A / 10, gaussian(base.d_out, rank // 2) @ Q[1::2] / 10
