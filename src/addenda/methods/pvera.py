"""PVeRA: VeRA whose inner activations are drawn from a distribution that the input decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method, ParameterSource
from addenda.core.products import FrozenPair
from addenda.core.ranges import integer, number
from addenda.core.registry import register
from addenda.methods.vera import kaiming_uniform

__all__ = ["PVeRA"]

_SAMPLE = ("training", "always", "never")


@register("pvera")
@dataclass(frozen=True)
class PVeRA(Method):
    """Update from random matrices that all layers share, through activations with a learned mean and variance.

    [m, s] = d * (A x),   z = m + exp(s / 2) * e,   e ~ N(0, 1),   y = base(x) + b * (B z)

    A: (2 * rank, d_in),  B: (d_out, rank),  d: (2 * rank,),  b: (d_out,);  m, s, e, z: (..., rank). A and B are
    frozen, drawn once (Kaiming-uniform) as large as the largest layer asks, and cut to each layer's size. b starts at
    zero, so the adapted layer starts equal to its base. Merging keeps the mean, z = m, and is then exact.
    Parameters: 2 * rank + d_out per layer.

    Args:
        rank: inner dimension, >= 1.
        d_initial: initial value of d, > 0.
        sample: when e is drawn: in ``training`` mode only, ``always``, so that repeated answers show how sure the
            adapter is, or ``never``, which is VeRA.

    **Cost**: that of VeRA, and while sampling another 2 * rank * d_in FLOP a row of input and the random numbers.

    **Use it when** data is scarce or ambiguous, or a spread of answers is wanted beside the answer.

    **Learning rate**: 1e-2, as for VeRA, whose parameters these are. On Banking77 with MiniLM, where VeRA gained, no
    rate trained anything (benchmarks/methods_quality): the noise begins at a deviation near one.

    **Differs from**: like PEFT's, this adds no penalty on the distribution to the loss. The matrices are saved with
    the adapter, because a generator's numbers are not promised to stay the same.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, PVeRA(rank=2)).trainable_parameters
        20

    References: arXiv:2512.07703. Kopiczko et al. 2023, arXiv:2310.11454, section 3 (VeRA).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        # The properties compare one run with another, so nothing may be drawn in between.
        {"rank": 6, "d_initial": 0.5, "sample": "never"},
    )

    rank: int = 256
    """Inner dimension of the update."""
    d_initial: float = 0.1
    """Initial value of the inner vector."""
    sample: str = "training"
    """training, always or never."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + number("d_initial", self.d_initial, above=0.0)
        if self.sample not in _SAMPLE:
            found.append(f"sample must be one of {', '.join(_SAMPLE)}, got {self.sample!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        return ["a grouped convolution mixes no channels before the noise"] if base.groups > 1 else []

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        d_in, d_out = max(base.d_in for base in bases), max(base.d_out for base in bases)
        return FrozenPair(
            source.constant(2 * self.rank, d_in, init=kaiming_uniform),
            source.constant(d_out, self.rank, init=kaiming_uniform),
        )

    def build(self, base: Base) -> PVeRAAdapter:
        d = base.parameter(2 * self.rank, init=self.d_initial)
        return PVeRAAdapter(d, base.parameter(base.d_out), d_in=base.d_in, sample=self.sample)


class PVeRAAdapter(Adapter):
    """d: (2 * rank,), b: (d_out,)."""

    additive = True
    common: FrozenPair

    def __init__(self, d: nn.Parameter, b: nn.Parameter, *, d_in: int, sample: str) -> None:
        super().__init__()
        self.d, self.b, self.d_in, self.sample = d, b, d_in, sample

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self._samples() else self._mean_term()

    def _samples(self) -> bool:
        return self.sample == "always" or (self.sample == "training" and self.training)

    def _mean_term(self) -> tuple[Tensor, Tensor, float]:
        rank = len(self.d) // 2
        A, B = self.common.A[:rank, : self.d_in], self.common.B[: len(self.b)]
        return self.d[:rank, None] * A, self.b[:, None] * B, 1.0

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self._samples():
            return base.add_low_rank(x, *self._mean_term())
        A = (self.d[:, None] * self.common.A[:, : self.d_in]).to(base.dtype)
        B = (self.b[:, None] * self.common.B[: len(self.b)]).to(base.dtype)
        each = torch.eye(len(A), dtype=A.dtype, device=A.device)
        mean, spread = base.outputs_last(base.low_rank(x, A, each)).chunk(2, dim=-1)
        z = mean + torch.exp(0.5 * spread) * torch.randn_like(spread)
        return base(x) + base.outputs_back(F.linear(z, B))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, _ = self._mean_term()
        return weight + B.to(weight.dtype) @ A.to(weight.dtype), bias
