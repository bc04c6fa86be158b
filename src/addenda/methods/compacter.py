"""Compacter: bottleneck adapters of Kronecker products, whose small factors all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method, ParameterSource
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.methods.bottleneck import Bottleneck

__all__ = ["Compacter"]

_PLACEMENTS = ("houlsby", "pfeiffer")


@register("compacter")
@dataclass(frozen=True)
class Compacter(Method):
    """Add a two-layer network to what a sub-layer returns, its weights sums of Kronecker products.

    y = h + U gelu(D h + e) + c,    h = base(x)
    D = sum_i A_i (x) (s_i t_i),    A_i: (n, n),  s_i: (size / n, rank),  t_i: (rank, d / n),  i = 1 .. n = division

    (x) is the Kronecker product; U is made likewise, from factors of its own and the same A_i, which all layers
    share. Neither D nor U is ever formed. The s_i of U start at zero, so the adapted layer starts equal to its base;
    the other factors are Glorot-uniform, A normal with variance 1 / n. Not mergeable: a non-linearity has no weight.
    Parameters: (2 * rank + 1) * (size + d) per layer, and division ** 3 once.

    Args:
        size: width of the bottleneck, a multiple of ``division``.
        division: number n of Kronecker products in a sum, >= 1; it divides the width d of the layer's output too.
        rank: of the second factors; 1 in the paper.
        placement: ``houlsby`` behind the attention's and the feed-forward's output layer ("Compacter"), ``pfeiffer``
            behind the feed-forward's alone ("Compacter++").

    Cost: per token and layer about 2 * n * rank * (size + d) multiplications for each of the two products, where a
    bottleneck of that size takes 2 * size * d.

    Use it when: a bottleneck adapter's quality is wanted at a tenth of its parameters or less.

    Learning rate: 3e-3, as in the authors' published configuration for T5-base on GLUE.

    Differs from: the authors draw A_i with a deviation of 1e-4, so that training starts near the base; here it starts
    at it. They train the layer norms too: ``whole`` names them where that is wanted.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, Compacter(size=2, division=2), targets=["0"]).trainable_parameters
        26

    References: Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 3.
    """

    learning_rate: ClassVar[float] = 3e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"size": 8},
        {"size": 4, "division": 2, "rank": 3, "placement": "pfeiffer"},
    )

    size: int = 24
    """Width of the bottleneck."""
    division: int = 4
    """Number of Kronecker products in a sum."""
    rank: int = 1
    """Rank of the second factors."""
    placement: str = "houlsby"
    """houlsby or pfeiffer."""

    def problems(self) -> list[str]:
        found = integer("size", self.size) + integer("division", self.division) + integer("rank", self.rank)
        if not found and self.size % self.division:
            found.append(f"size must be a multiple of division = {self.division}, got {self.size}")
        if self.placement not in _PLACEMENTS:
            found.append(f"placement must be one of {', '.join(_PLACEMENTS)}, got {self.placement!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        if base.channels_out % self.division:
            return [f"its output has {base.channels_out} features, no multiple of division = {self.division}"]
        return []

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return Bottleneck(placement=self.placement).default_targets(paths)

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        n = self.division
        return Rule(source.parameter(n, n, n, init=_normal))

    def build(self, base: Base) -> CompacterAdapter:
        n, rank, inner, outer = self.division, self.rank, self.size, base.channels_out
        return CompacterAdapter(
            down=_Factors(
                base.parameter(n, inner // n, rank, init=_glorot_uniform),
                base.parameter(n, rank, outer // n, init=_glorot_uniform),
                base.parameter(inner),
            ),
            up=_Factors(
                base.parameter(n, outer // n, rank),
                base.parameter(n, rank, inner // n, init=_glorot_uniform),
                base.parameter(outer),
            ),
        )


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 1 / math.sqrt(tensor.shape[0]), generator=generator)


def _glorot_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    bound = math.sqrt(6 / (tensor.shape[-1] + tensor.shape[-2]))
    tensor.uniform_(-bound, bound, generator=generator)


class Rule(nn.Module):
    """A: (n, n, n), the first factors of the Kronecker products of all layers."""

    def __init__(self, A: nn.Parameter) -> None:
        super().__init__()
        self.A = A


class _Factors(nn.Module):
    """s: (n, d_out / n, rank), t: (n, rank, d_in / n), bias: (d_out,)."""

    def __init__(self, s: nn.Parameter, t: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.s, self.t, self.bias = s, t, bias

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        """x: (..., d_in) -> sum_i (A_i (x) s_i t_i) x + bias: (..., d_out)."""
        s, t, A, bias = (factor.to(x.dtype) for factor in (self.s, self.t, A, self.bias))
        h = torch.einsum("...bq,irq->...bir", x.view(*x.shape[:-1], len(A), -1), t)
        h = torch.einsum("...bir,iab->...air", h, A)
        return torch.einsum("...air,ipr->...ap", h, s).flatten(-2) + bias


class CompacterAdapter(Adapter):
    """down and up: the second factors and the bias of each product."""

    common: Rule

    def __init__(self, *, down: _Factors, up: _Factors) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        A, h = self.common.A, base.outputs_last(y)
        return y + base.outputs_back(self.up(F.gelu(self.down(h, A)), A))
