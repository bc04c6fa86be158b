"""LoHa: an update that is the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import flag
from addenda.core.ranked import Scaled
from addenda.core.registry import register

__all__ = ["LoHa", "LoHaAdapter", "uniform"]


@register("loha")
@dataclass(frozen=True)
class LoHa(Scaled):
    """Low-rank Hadamard product: an update of rank up to rank ** 2 from two pairs of factors.

    y = base(x) + scaling * ((B1 A1) * (B2 A2)) x,   A1, A2: (rank, d_in),  B1, B2: (d_out, rank)

    * is elementwise, scaling = alpha / rank. A1, B1 and B2 start uniform and A2 zero, so the adapted layer starts
    equal to its base. Mergeable exactly into an unquantized weight. Parameters: 2 * rank * (d_in + d_out) per layer.

    The product of two matrices of rank r is a matrix of rank r ** 2, whose factors are the products of each pair of
    columns. Where that is cheaper than the dense update, 2 * rank ** 2 * (d_in + d_out) FLOP a row against
    2 * d_in * d_out, the layer runs as LoRA of that rank does, and nothing of d_out x d_in is formed.

    Args:
        rank: inner dimension of both pairs, >= 1; half of LoRA's for as many parameters.
        alpha: numerator of the scaling, dimensionless, > 0. None means the rank, that is a scaling of 1.
        tucker: for convolutions whose kernel has more than one position, put the kernel into a core of its own:
            A: (rank, channels), B: (d_out, rank) and T: (rank, rank, kernel) for each of the two.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.

    **Cost**: twice LoRA's parameters at the same rank; in time, LoRA's of rank ** 2 or the dense update, whichever
    is less. **Use it when** an update of high rank is wanted from few parameters; it was made for convolutions.

    **Learning rate**: 3e-3. Of half decades 1e-2 was best on Banking77 with MiniLM (benchmarks/methods_quality), and
    1e-4, under which PEFT's published comparison (MetaMathQA, Llama 3.2 3B) runs it untuned, trained hardly anything.

    **Differs from**: the paper builds whole layers of such products and trains them from scratch; adding one to a
    frozen weight is LyCORIS's use of it. PEFT writes the factors of the Tucker form transposed, and its uniform start
    is wider there.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, LoHa(rank=2), targets=["0"]).trainable_parameters
        48

    References: Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2. Yeh et al. 2023, arXiv:2309.14859, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 3},
        {"rank": 5, "alpha": 7.0},
        {"rank": 4, "tucker": True},
    )

    rank: int = 8
    """Inner dimension of both pairs."""
    tucker: bool = False
    """Give a convolution's kernel a core of its own."""

    def problems(self) -> list[str]:
        return super().problems() + flag("tucker", self.tucker)

    def problems_at(self, base: Base) -> list[str]:
        return []  # the rank of a pair may exceed what a layer holds

    def build(self, base: Base) -> LoHaAdapter:
        rank, kernel = self.rank_at(base.path), base.kernel_volume
        cores = kernel if self.tucker and kernel > 1 else None
        width = base.d_in // kernel if cores else base.d_in
        return LoHaAdapter(
            base.parameter(rank, width, init=uniform),
            base.parameter(base.d_out, rank, init=uniform),
            base.parameter(rank, width),
            base.parameter(base.d_out, rank, init=uniform),
            cores=[base.parameter(rank, rank, cores, init=uniform) for _ in range(2)] if cores else [],
            scaling=self.scaling_at(base.path),
        )


def uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with values between -b and b, b = 1 / sqrt of the size of all dimensions but the first."""
    tensor.uniform_(-1, 1, generator=generator).div_(math.sqrt(tensor[0].numel()))


class LoHaAdapter(Adapter):
    """A1, A2: (rank, d_in), B1, B2: (d_out, rank); with cores (rank, rank, kernel), A1 and A2 are (rank, channels)."""

    additive = True

    def __init__(
        self,
        A1: nn.Parameter,
        B1: nn.Parameter,
        A2: nn.Parameter,
        B2: nn.Parameter,
        *,
        cores: list[nn.Parameter],
        scaling: float,
    ) -> None:
        super().__init__()
        self.A1, self.B1, self.A2, self.B2 = A1, B1, A2, B2
        self.T1: nn.Parameter | None = cores[0] if cores else None
        self.T2: nn.Parameter | None = cores[1] if cores else None
        self.scaling = scaling

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        (rank, d_in), d_out = self.A1.shape, len(self.B1)
        if self.T1 is not None or rank**2 * (d_in + d_out) > d_in * d_out:
            return None
        A = (self.A1[:, None] * self.A2).flatten(0, 1)
        B = (self.B1[:, :, None] * self.B2[:, None]).flatten(1)
        return A, B, self.scaling

    def forward(self, x: Tensor, base: Base) -> Tensor:
        term = self.low_rank_term()
        return (
            base(x) + base.apply(x, self._delta(base.dtype)) if term is None else base.add_low_rank(x, *term)
        )

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self._delta(weight.dtype), bias

    def _delta(self, dtype: torch.dtype) -> Tensor:
        first, second = _product(self.A1, self.B1, self.T1), _product(self.A2, self.B2, self.T2)
        return (self.scaling * first * second).to(dtype)


def _product(A: Tensor, B: Tensor, T: Tensor | None) -> Tensor:
    return B @ A if T is None else torch.einsum("oi,ijk,jc->ock", B, T, A).flatten(1)
