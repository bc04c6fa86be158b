"""LoKr: an update that is a Kronecker product, of a small matrix and a low-rank one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import flag, integer
from addenda.core.ranked import Scaled
from addenda.core.registry import register
from addenda.methods.loha import uniform

__all__ = ["LoKr", "factors"]


@register("lokr")
@dataclass(frozen=True)
class LoKr(Scaled):
    """Low-rank Kronecker product: one small matrix says how copies of another are scaled and placed.

    y = base(x) + scaling * (W1 kron W2) x,   W1: (p, m),  W2: (q, n),  p * q = d_out,  m * n = d_in

    scaling = alpha / rank. W2 is B A with B: (q, rank) and A: (rank, n), or one matrix where the rank is at least
    half of its larger side. W1 starts uniform and W2 zero (in its factor B, where it has factors), so the adapted
    layer starts equal to its base. Mergeable exactly into an unquantized weight. Parameters: p * m + rank * (q + n)
    per layer, or p * m + q * n.

    A linear layer never forms the product: x is viewed as (m, n), multiplied by A, W1 and B in turn.

    Args:
        rank: inner dimension of W2, >= 1.
        alpha: numerator of the scaling, dimensionless, > 0. None means the rank, that is a scaling of 1.
        factor: p and m, where it divides d_out and d_in; else their largest divisors below it. None takes the
            divisors nearest below the square root, which gives the smallest adapter.
        decompose_both: W1 too is a product of that rank, where the rank is below half of its larger side.
        tucker: for convolutions whose kernel has more than one position, put the kernel into a core of its own:
            W2 from B: (q, rank), A: (rank, channels / m) and T: (rank, rank, kernel).
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.

    **Cost**: in a linear layer with factors 2 * (d_in * rank + p * m * rank + d_out * rank) FLOP a row, about LoRA's.
    A convolution and an embedding form the whole update once in each forward. **Use it when** an adapter has to be
    very small and still be of full rank; the rank of a Kronecker product is the product of the ranks.

    **Learning rate**: 3e-3, of PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B, factor 4).

    **Differs from**: PEFT starts W1 at zero by default, and at random as ``init_weights="lycoris"``, with zeros in A
    where here they are in B; the paper's code does the latter.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(64, 36))
        >>> addenda.attach(model, LoKr(rank=2), targets=["0"]).trainable_parameters
        76

    References: Yeh et al. 2023, arXiv:2309.14859, section 3. Edalati et al. 2022, arXiv:2212.10650.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 2, "factor": 2},
        {"rank": 8, "alpha": 5.0},
        {"rank": 1, "decompose_both": True, "tucker": True},
    )

    rank: int = 8
    """Inner dimension of W2."""
    factor: int | None = None
    """Size of W1; None takes the square roots of d_out and d_in."""
    decompose_both: bool = False
    """Make W1 a product of low rank too."""
    tucker: bool = False
    """Give a convolution's kernel a core of its own."""

    def problems(self) -> list[str]:
        found = super().problems() + flag("decompose_both", self.decompose_both) + flag("tucker", self.tucker)
        return found if self.factor is None else found + integer("factor", self.factor)

    def problems_at(self, base: Base) -> list[str]:
        return []  # the rank of a pair may exceed what a layer holds

    def build(self, base: Base) -> LoKrAdapter:
        rank, kernel = self.rank_at(base.path), base.kernel_volume
        (p, q), (m, n) = factors(base.d_out, self.factor), factors(base.d_in // kernel, self.factor)
        left = {"W1": base.parameter(p, m, init=uniform)}
        if self.decompose_both and 2 * rank < max(p, m):
            left = {"B1": base.parameter(p, rank, init=uniform), "A1": base.parameter(rank, m, init=uniform)}
        if 2 * rank >= max(q, n):
            right = {"W2": base.parameter(q, n * kernel)}
        elif self.tucker and kernel > 1:
            A, T = base.parameter(rank, n, init=uniform), base.parameter(rank, rank, kernel, init=uniform)
            right = {"B2": base.parameter(q, rank), "A2": A, "T2": T}
        else:
            right = {"B2": base.parameter(q, rank), "A2": base.parameter(rank, n * kernel, init=uniform)}
        return LoKrAdapter(left | right, self.scaling_at(base.path))


def factors(size: int, factor: int | None) -> tuple[int, int]:
    """Return two whole numbers whose product is ``size``, the first of them ``factor`` where it divides.

    Example:
        >>> factors(36, None), factors(20, None), factors(20, 10), factors(20, 3)
        ((6, 6), (4, 5), (10, 2), (2, 10))
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    largest = min(factor or size, math.isqrt(size))
    first = next(divisor for divisor in range(largest, 0, -1) if size % divisor == 0)
    return first, size // first


class LoKrAdapter(Adapter):
    """W1: (p, m), or B1: (p, rank) and A1: (rank, m); W2: (q, n * kernel), or B2: (q, rank) and A2: (rank, n * kernel),
    or with T2: (rank, rank, kernel), A2: (rank, n)."""

    additive = True
    W1: nn.Parameter
    W2: nn.Parameter
    A1: nn.Parameter
    B1: nn.Parameter
    A2: nn.Parameter
    B2: nn.Parameter
    T2: nn.Parameter

    def __init__(self, parameters: Mapping[str, nn.Parameter], scaling: float) -> None:
        super().__init__()
        self.hold(**parameters)
        self.scaling = scaling

    def has(self, name: str) -> bool:
        """Whether it has a parameter of this name."""
        return name in self._parameters

    def left(self) -> Tensor:
        """W1: (p, m)."""
        return self.W1 if self.has("W1") else self.B1 @ self.A1

    def right(self) -> Tensor:
        """W2: (q, n * kernel)."""
        if self.has("T2"):
            return torch.einsum("ki,ijp,jn->knp", self.B2, self.T2, self.A2).flatten(1)
        return self.W2 if self.has("W2") else self.B2 @ self.A2

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not base.pointwise:
            return base(x) + base.apply(x, self._delta(base.dtype))
        right = (self.W2,) if self.has("W2") else (self.A2, self.B2)
        first, *then = [factor.to(base.dtype) for factor in right]
        left = (self.scaling * self.left()).to(base.dtype)
        h = _rows(x.reshape(*x.shape[:-1], left.shape[1], -1), first)  # (..., m, rank)
        h = _rows(h.transpose(-1, -2), left).transpose(-1, -2)  # (..., p, rank)
        for factor in then:
            h = _rows(h, factor)
        return base(x) + h.flatten(-2)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self._delta(weight.dtype), bias

    def _delta(self, dtype: torch.dtype) -> Tensor:
        return torch.kron(self.scaling * self.left(), self.right()).to(dtype)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    # F.linear on more than two dimensions rounds otherwise when the weight is frozen.
    return (x.reshape(-1, x.shape[-1]) @ weight.t()).view(*x.shape[:-1], -1)
