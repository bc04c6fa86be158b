"""DEFT: take a subspace out of the weight, and put something learned in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer, number, one_of
from addenda.core.registry import register

__all__ = ["DEFT", "PROJECTIONS", "DEFTAdapter", "project", "small_normal"]

PROJECTIONS = ("relu", "orthogonal")


@register("deft")
@dataclass(frozen=True)
class DEFT(Method):
    """Decompositional fine-tuning: remove what the weight writes into a learned subspace, and inject anew.

    y = base(x) + Q (scaling * R - S^T W) x,   P, Q, S: (d_out, rank),  R: (rank, d_in)

    relu:        Q = P, S = relu(P)
    orthogonal:  Q = S = an orthonormal basis of P's columns (QR), so that Q S^T is a projection

    P and R are trained. P starts normal with a deviation of 0.02 and R as S^T W / scaling, so the adapted layer starts
    equal to its base. Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out) per layer.

    Args:
        rank: dimensions of the subspace, 1 <= rank <= min(d_in, d_out).
        projection: ``relu`` or ``orthogonal``.
        alpha: numerator of scaling = alpha / rank, > 0. None means a scaling of 1.

    **Cost**: LoRA's, and S^T W in each forward: 2 * rank * d_in * d_out FLOP, whatever the number of rows, for which
    a packed weight is unpacked. **Use it when** a model should learn something new in the place of something it
    knows: an update that LoRA would have to learn as a difference.

    **Learning rate**: 1e-4, the rate under which PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B)
    runs it.
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 3e-3.

    **Differs from**: the paper's code starts R at random, so that the subspace is lost at once; starting R at what
    is removed is PEFT's default. PEFT lowers a rank above d_out to d_out, which is refused here. PEFT's option
    ``para`` is the method 'para' here.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, DEFT(rank=2), targets=["0"]).trainable_parameters
        24

    References: arXiv:2509.22793 (NeurIPS 2025).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 3},
        {"rank": 5, "projection": "orthogonal", "alpha": 2.0},
    )

    rank: int = 8
    """Dimensions of the subspace."""
    projection: str = "relu"
    """relu or orthogonal."""
    alpha: float | None = None
    """Numerator of the scaling; None means a scaling of 1."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + one_of("projection", self.projection, PROJECTIONS)
        return found if self.alpha is None else found + number("alpha", self.alpha, above=0.0)

    def problems_at(self, base: Base) -> list[str]:
        rank, limit = self.rank, min(base.d_in, base.d_out)
        return [f"rank {rank} exceeds min(d_in, d_out) = {limit}"] if rank > limit else []

    def build(self, base: Base) -> DEFTAdapter:
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        P = base.parameter(base.d_out, self.rank, init=small_normal)

        def removed(tensor: Tensor, _: torch.Generator) -> None:
            weight = base.weight().to(tensor)
            tensor.copy_(project(P.detach().to(tensor), self.projection)[1].t() @ weight).div_(scaling)

        R = base.parameter(self.rank, base.d_in, init=removed)
        return DEFTAdapter(P, R, projection=self.projection, scaling=scaling)


def small_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with normal values of deviation 0.02."""
    tensor.normal_(0, 0.02, generator=generator)


def project(P: Tensor, projection: str) -> tuple[Tensor, Tensor]:
    """Return Q and S, (d_out, rank) each, of which Q S^T is what takes the subspace out."""
    if projection == "relu":
        return P, P.relu()
    Q = torch.linalg.qr(P)[0]
    return Q, Q


class DEFTAdapter(Adapter):
    """P: (d_out, rank); R: (rank, d_in), or None where nothing is injected."""

    additive = reads_weight = True

    def __init__(
        self, P: nn.Parameter, R: nn.Parameter | None, *, projection: str, scaling: float = 1.0
    ) -> None:
        super().__init__()
        self.P, self.R = P, R
        self.projection, self.scaling = projection, scaling

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.add_low_rank(x, *self._factors(base.weight()), 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self._factors(weight)
        return weight + B @ A, bias

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        Q, S = (factor.to(weight.dtype) for factor in project(self.P, self.projection))
        removed = S.t() @ weight
        return (-removed if self.R is None else self.scaling * self.R.to(weight.dtype) - removed), Q
