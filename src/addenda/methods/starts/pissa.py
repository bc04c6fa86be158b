"""PiSSA: the factors begin as the principal part of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.decomposition import leading_svd
from addenda.core.ranges import integer
from addenda.core.starts import Start, start, wide_weight

__all__ = ["PiSSA", "balanced"]


@start("pissa")
@dataclass(frozen=True)
class PiSSA(Start):
    """The leading singular vectors of the weight, which is W = U S V^T.

    A0 = sqrt(S_r / scaling) V_r^T,   B0 = U_r sqrt(S_r / scaling),   so that scaling * B0 A0 is W's best of rank r

    Args:
        iterations: 0 decomposes the whole weight; more sketch it at random and refine the sketch so often, which is
            several times faster and off by little.

    **Cost**: a decomposition of each weight once, about 10 * d_out * d_in * min(d_out, d_in) FLOP; then, like every
    start with a product other than zero, twice the rank in the forward pass and in the file.

    **Use it when** the rank is small and training short: the directions in which the base is large move first.

    **Learning rate**: a tenth of the method's where none is set: at the whole of it the first steps overshot on a
    small trial (decision 9); not tuned.

    Differs from: the paper takes scaling * B0 A0 off the weight. Here the base never changes: the adapter takes it off
    what it adds. Over a quantized base the paper (QPiSSA) quantizes what is left of the weight, which has smaller
    outliers; here the base stays as it was quantized, and the start is of what it holds.

    References: Meng et al. 2024, arXiv:2404.02948, section 3.
    """

    needs = "weight"
    moved = True
    rate = 0.1

    iterations: int = 0
    """Rounds of refining a random sketch; 0 decomposes the whole weight."""

    def problems(self) -> list[str]:
        return integer("iterations", self.iterations, least=0)

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        svd = leading_svd(wide_weight(base), rank, iterations=self.iterations, generator=generator)
        return balanced(*svd, scaling)


def balanced(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B, of equal size, with scaling * B A = U S Vh."""
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root
