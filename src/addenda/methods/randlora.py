"""RandLoRA: a full-rank update as a sum of random low-rank products, scaled by trained diagonals."""

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

__all__ = ["RandLoRA"]

_BASES = ("dense", "sparse", "very-sparse")


@register("randlora")
@dataclass(frozen=True)
class RandLoRA(Method):
    """Full-rank update from random bases that all layers share: train the diagonals between them.

    y = base(x) + scaling * sum over j of B_j diag(l_j) A diag(g_j) x,   j = 1 .. n,  n = ceil(m / rank)

    m = min(d_in, d_out), M = max(d_in, d_out);  A: (rank, m),  B_j: (M, rank),  l_j: (rank,),  g_j: (m,); where
    d_out is the smaller side, the transpose of the sum is used. A and all B_j are frozen, drawn once as large as the
    largest layer asks, with a standard deviation of one, and cut to each layer's size. l starts at zero and g at 1 / m,
    so the adapted layer starts equal to its base. Mergeable exactly into an unquantized weight.
    Parameters: n * (rank + m) per layer, about m * m / rank: a *smaller* rank trains more.

    Args:
        rank: inner dimension of each product, >= 1.
        alpha: numerator of the scaling alpha / rank, dimensionless, > 0. None means 20 * rank.
        bases: ``dense`` draws uniform numbers; ``sparse`` -1, 0 and 1 with two zeros in three; ``very-sparse`` with
            all but 2 in sqrt(m) of them zero.

    **Cost**: 2 * m * (m + M) FLOP a row of input, several times that of the frozen layer's own product, and one more
    matrix of the layer's size while it runs. Memory of gradients and optimiser is LoRA's for as many parameters.

    **Use it when** LoRA stops getting better with more rank: the update has full rank.

    **Learning rate**: 3e-4. At 1e-3 a first step of Adam would change a weight several times as much as LoRA's does
    at that rate, because of the scaling of 20. Not tuned.

    **Differs from**: PEFT, and so this, pairs the columns of B with the rows of A in another order than the paper
    writes them; as both are random, nothing follows from it. The dense bases are rounded to bfloat16, as PEFT stores
    them, so that both hold the same numbers; they are saved with the adapter.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, RandLoRA(rank=2)).trainable_parameters
        24

    References: Albert et al. 2025, arXiv:2502.00987, section 4.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 6, "alpha": 12.0},
        {"rank": 7, "alpha": 7.0, "bases": "sparse"},
    )

    rank: int = 32
    """Inner dimension of each product."""
    alpha: float | None = None
    """Numerator of the scaling; None means 20 * rank."""
    bases: str = "dense"
    """dense, sparse or very-sparse."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank)
        found += [] if self.alpha is None else number("alpha", self.alpha, above=0.0)
        if self.bases not in _BASES:
            found.append(f"bases must be one of {', '.join(_BASES)}, got {self.bases!r}")
        return found

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        sides = max(base.d_in for base in bases), max(base.d_out for base in bases)
        small, large = min(sides), max(sides)
        count = math.ceil(small / self.rank)
        return FrozenPair(
            source.constant(
                self.rank, 1, small, init=lambda A, draws: A.copy_(self.draw_smaller(small, draws))
            ),
            source.constant(
                large, count, self.rank, init=lambda B, draws: B.copy_(self.draw_larger(small, large, draws))
            ),
        )

    def draw_smaller(self, small: int, generator: torch.Generator) -> Tensor:
        """Draw A as (rank, 1, small)."""
        shape = self.rank, 1, small
        return _unit(
            _dense(shape, generator) if self.bases == "dense" else self._ternary(shape, small, generator)
        )

    def draw_larger(self, small: int, large: int, generator: torch.Generator) -> Tensor:
        """Draw all B_j as (large, n, rank)."""
        count = math.ceil(small / self.rank)
        if self.bases != "dense":
            return _unit(self._ternary((large, count, self.rank), small, generator))
        return _unit(torch.cat([_dense((large, 1, self.rank), generator) for _ in range(count)], dim=1))

    def _ternary(self, shape: tuple[int, ...], small: int, generator: torch.Generator) -> Tensor:
        share = 1 / (2 * (3.0 if self.bases == "sparse" else math.sqrt(small)))
        drawn = torch.rand(shape, generator=generator)
        return (drawn > 1 - share).float() - (drawn < share).float()

    def build(self, base: Base) -> RandLoRAAdapter:
        small = min(base.d_in, base.d_out)
        count = math.ceil(small / self.rank)
        return RandLoRAAdapter(
            base.parameter(self.rank, count),
            base.parameter(count, small, init=1 / max(count, small)),
            shape=(base.d_out, base.d_in),
            scaling=self.scaling,
        )


def _dense(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(
        torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator
    )


def _unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.std()


class RandLoRAAdapter(ProductAdapter):
    """rows: (rank, n), all l_j;  columns: (n, m), all g_j."""

    common: FrozenPair

    def __init__(
        self, rows: nn.Parameter, columns: nn.Parameter, *, shape: tuple[int, int], scaling: float
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.shape, self.scaling = shape, scaling

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        count, small = self.columns.shape
        A = self.common.A[:, :, :small] * self.rows[:, :, None] * self.columns
        B = self.common.B[: max(self.shape), :count]
        A, B = A.flatten(0, 1), B.flatten(1)
        return (A, B, self.scaling) if small == self.shape[1] else (B.t(), A.t(), self.scaling)
