"""Lily: neighbouring layers share A, all layers of a name share several B, and a router mixes these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method, ParameterSource
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import integer, number
from addenda.core.registry import register

__all__ = ["Lily"]


@register("lily")
@dataclass(frozen=True)
class Lily(Method):
    """Low-rank update from shared factors: one A for neighbouring layers, a mixture of B that the input decides.

    h = A x,   p = mean over the batch of softmax(R h),   y = base(x) + scaling * (sum over e of p_e B_e) h

    A: (rank, d_in),  B_e: (d_out, rank), e = 1 .. experts,  R: (experts, rank),  h: (..., rank),  p: (experts,)

    Layers of the same last name and the same shape are a family. In it, each `stride` layers in a row share A, all
    share the B, and each has its own R. A and R start Kaiming-uniform and B zero, so the adapted layer starts equal to
    its base. Not mergeable: the mixture depends on the input. Parameters: of a family of n layers,
    ceil(n / stride) * rank * d_in + experts * rank * d_out + n * experts * rank.

    Args:
        rank: inner dimension, >= 1. As there are fewer factors, larger than LoRA's: two to four times.
        stride: how many neighbouring layers share A, >= 1.
        experts: how many B a family has, >= 2; about as many as it has A.
        scaling: factor of the update, dimensionless, > 0.

    **Cost**: that of LoRA of the same rank, 2 * experts * rank FLOP a row of input for the router, and experts *
    rank * d_out multiplications a call for the mixture.

    **Use it when** LoRA's rank is bounded by memory: the same parameters give a higher rank.

    **Learning rate**: 1e-3, as for LoRA. Not tuned.

    **Differs from**: nothing in PEFT. As there, the router's weights are averaged over everything that is in the batch,
    padding too, so what a row answers depends a little on the other rows, and a layer takes no grouped convolution.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(*[nn.ModuleDict({"up": nn.Linear(8, 4)}) for _ in range(4)])
        >>> addenda.plan(model, Lily(rank=2, stride=2, experts=3)).parameters
        80

    References: Zhong et al. 2024, arXiv:2407.09946, section 3.
    """

    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4},
        {"rank": 3, "stride": 2, "experts": 3, "scaling": 2.0},
    )
    exceptions: ClassVar[Mapping[str, str]] = {
        "rows": "the mixture is an average over the rows that run together, so a row's answer depends on the others"
    }

    rank: int = 32
    """Inner dimension of the update."""
    stride: int = 2
    """How many neighbouring layers share A."""
    experts: int = 2
    """How many B are mixed."""
    scaling: float = 1.0
    """Factor of the update."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + integer("stride", self.stride)
        return found + integer("experts", self.experts, least=2) + number("scaling", self.scaling, above=0.0)

    def problems_at(self, base: Base) -> list[str]:
        return ["a grouped convolution gives the router no one view of the input"] if base.groups > 1 else []

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        families: dict[tuple[str, int, int], list[str]] = {}
        for base in bases:
            families.setdefault((base.path.rpartition(".")[2], base.d_in, base.d_out), []).append(base.path)
        factors = SharedFactors()
        for (_, d_in, d_out), paths in families.items():
            factors.B.append(source.parameter(self.experts, self.rank, d_out))
            for i, path in enumerate(paths):
                if i % self.stride == 0:
                    factors.A.append(source.parameter(self.rank, d_in, init=kaiming_uniform))
                factors.places[path] = len(factors.A) - 1, len(factors.B) - 1
        return factors

    def build(self, base: Base) -> LilyAdapter:
        assert isinstance(base.common, SharedFactors)
        router = base.parameter(self.experts, self.rank, init=kaiming_uniform)
        return LilyAdapter(router, base.common.places[base.path], self.scaling)


class SharedFactors(nn.Module):
    """A: (rank, d_in) each, B: (experts, rank, d_out) each; places: which of each a layer has, by path."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.places: dict[str, tuple[int, int]] = {}


class LilyAdapter(Adapter):
    """router: (experts, rank)."""

    additive = True
    common: SharedFactors

    def __init__(self, router: nn.Parameter, place: tuple[int, int], scaling: float) -> None:
        super().__init__()
        self.router, self.place, self.scaling = router, place, scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return this layer's A, (rank, d_in), and its B, (experts, rank, d_out)."""
        return self.common.A[self.place[0]], self.common.B[self.place[1]]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B, router = (tensor.to(base.dtype) for tensor in (*self.factors(), self.router))
        each = torch.eye(len(A), dtype=A.dtype, device=A.device)
        # How a product of a tensor with gaps is rounded depends on whether a gradient is asked for.
        h = base.outputs_last(base.low_rank(x, A, each)).contiguous()
        weights = F.linear(h, router).softmax(-1).flatten(0, -2).mean(0)
        mixed = torch.einsum("e,ero->or", weights, B)
        return base(x) + self.scaling * base.outputs_back(F.linear(h, mixed))
