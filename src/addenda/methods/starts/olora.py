"""OLoRA: the factors begin as the first part of the weight's QR decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.starts import Start, start, wide_weight

__all__ = ["OLoRA"]


@start("olora")
@dataclass(frozen=True)
class OLoRA(Start):
    """An orthonormal basis of the weight's first columns: W = Q R.

    A0 = R_r (the first r rows),   B0 = Q_r (the first r columns)

    **Cost**: a QR decomposition of each weight once, some 2 * d_out * d_in * min(d_out, d_in) FLOP, which takes a
    fraction of a singular value decomposition; then twice the rank in the forward pass and in the file.

    **Use it when** PiSSA's decomposition takes too long: B0 is orthonormal, but spans the weight's first columns rather
    than the directions in which it is large.

    **Learning rate**: a tenth of the method's where none is set: at the whole of it the first steps overshot on a
    small trial (decision 9); not tuned.

    Differs from: the paper takes scaling * B0 A0 off the weight; here the base never changes, and the adapter takes it
    off what it adds.

    References: Büyükakyüz 2024, arXiv:2406.01775, section 3.
    """

    needs = "weight"
    moved = True
    rate = 0.1

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(wide_weight(base))
        return R[:rank], Q[:, :rank]
