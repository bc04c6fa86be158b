"""LoRA: low-rank adaptation, and what the methods that train such a pair share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core import starts
from addenda.core.contract import Adapter, Base
from addenda.core.observations import Needs, Observer
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import flag, integer, number
from addenda.core.ranked import Scaled
from addenda.core.registry import register

__all__ = ["LoRA", "LoRAAdapter", "LowRank", "add_low_rank"]


@dataclass(frozen=True)
class LowRank(Scaled):
    """The settings of a pair A: (rank, d_in), B: (d_out, rank) that stands for B A; not a method by itself."""

    usual_scaling: ClassVar[float] = 2.0

    alpha: float | None = None
    """Numerator of the scaling; None means 2 * rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of A during training."""
    rank_stabilized: bool = False
    """Divide alpha by sqrt(rank) instead of rank."""

    def problems(self) -> list[str]:
        found = number("dropout", self.dropout, least=0.0, below=1.0)
        return super().problems() + found + flag("rank_stabilized", self.rank_stabilized)

    def scaling_at(self, path: str) -> float:
        """Return the scaling that applies to the layer at ``path``."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def pair_for(self, base: Base) -> tuple[nn.Parameter, nn.Parameter]:
        """Make A, Kaiming-uniform, and B, zero."""
        rank = self.rank_at(base.path)
        return base.parameter(rank, base.d_in, init=kaiming_uniform), base.parameter(base.d_out, rank)


@register("lora")
@dataclass(frozen=True)
class LoRA(LowRank):
    """Low-rank update of a weight: train B A, keep W.

    y = base(x) + scaling * B (A x),   A: (rank, d_in),  B: (d_out, rank)

    scaling = alpha / rank, or alpha / sqrt(rank) when rank-stabilized. A starts Kaiming-uniform and B zero, or
    both as another `start` says, whose product is then taken off: y = base(x) + scaling * (B A - B0 A0) x. Either way
    the adapted layer starts equal to its base. Mergeable exactly into an unquantized weight.
    Parameters: rank * (d_in + d_out) per layer, d_out more with a bias.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank, that is a scaling of 2 at any rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank, so that the size of the update does not fall
            with the rank.
        ranks: another rank for the layers a literal suffix names, such as ``{"down_proj": 32}``; the last that
            matches counts.
        alphas: another alpha likewise.
        b_rate: learning rate of B as a multiple of A's, > 0 (LoRA+). Its paper finds ratios well above 1 better, 16
            say, with a lower rate for A.
        bias: also train a vector (d_out,) that is added to B A x; not fused then.
        start: how A and B begin. Drawn: ``kaiming``, ``gaussian``, ``orthogonal``. Computed from the weight: ``pissa``,
            ``olora``. From what :func:`addenda.observe` found, in a recipe on its training rows: ``eva`` and ``corda``
            (inputs), ``lora_ga`` (gradients), ``loftq`` (the original of a quantized base; the adapted layer then
            starts nearer to that, not equal to its base). Their docstrings say more.
        start_settings: settings of the start's own, such as ``{"iterations": 8}`` of ``pissa``.
        start_rows: rows of data that a recipe observes where the start needs it, >= 1.

    **Cost**: 2 * rank * (d_in + d_out) FLOP a token and direction beside the base's 2 * d_in * d_out.
    **Use it when** nothing speaks for another: it is the cheapest to run, merges exactly, and every server reads it.
    **Learning rate**: 1e-3, at a scaling of 2 and ranks about 16; not tuned for each model.

    Differs from: the paper initializes A with a Gaussian; the official code, PEFT and this use Kaiming-uniform.
    PEFT's default alpha is 8 whatever the rank. PEFT keys per-layer ranks by regular expressions, this by suffixes.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, LoRA(rank=2), targets=["0"]).trainable_parameters
        24

    References: Hu et al. 2021, arXiv:2106.09685, section 4.1. Kalajdzievski 2023, arXiv:2312.03732 (rank-stabilized).
    Hayou et al. 2024, arXiv:2402.12354 (LoRA+).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {},
        {"rank": 3, "alpha": 5.0, "rank_stabilized": True, "b_rate": 4.0, "bias": True},
        {"rank": 4, "start": "pissa"},
    )

    b_rate: float = 1.0
    """Learning rate of B as a multiple of A's (LoRA+)."""
    bias: bool = False
    """Also train a vector that is added to B A x."""
    start: str = "kaiming"
    """How A and B begin, by the name of a start."""
    start_settings: Mapping[str, starts.Setting] = field(default_factory=dict)
    """Settings of the start's own."""
    start_rows: int = 64
    """Rows of data that a recipe observes for a start that needs it."""

    def problems(self) -> list[str]:
        found = super().problems() + number("b_rate", self.b_rate, above=0.0) + flag("bias", self.bias)
        return (
            found + integer("start_rows", self.start_rows) + starts.problems(self.start, self.start_settings)
        )

    def problems_at(self, base: Base) -> list[str]:
        found = super().problems_at(base) or self.begins().problems_at(base, self.rank_at(base.path))
        if self.bias and base.channels_in is None:
            found = [*found, "bias has no place in a layer whose input holds indices"]
        return found

    def rate_of(self, parameter: str) -> float:
        return self.b_rate if parameter == "B" else 1.0

    def begins(self) -> starts.Start:
        """Return the start with its settings."""
        return starts.make(self.start, self.start_settings)

    def usual_rate(self) -> float:
        return self.learning_rate * self.begins().rate

    def needs(self) -> Needs | None:
        return self.begins().needs

    def observer(self, base: Base) -> Observer:
        return self.begins().observer(base, self.rank_at(base.path))

    def rows_to_observe(self) -> int:
        return self.start_rows

    def settled(self, layers: Mapping[str, Mapping[str, Tensor]]) -> Self:
        before = {path: self.rank_at(path) for path in layers}
        after = self.begins().ranks(before, layers)
        if after == before:
            return self
        # A path may be the end of another one, which then has to come later: the last that matches counts.
        ranks = {path: after[path] for path in sorted(after, key=len)}
        dealt = dataclasses.replace(self, ranks=ranks)
        # The scaling of a layer stays, so that none learns faster for having got another rank.
        power = 0.5 if self.rank_stabilized else 1.0
        kept = {
            path: self.scaling_at(path) for path in ranks if dealt.scaling_at(path) != self.scaling_at(path)
        }
        alphas = {path: scaling * ranks[path] ** power for path, scaling in kept.items()}
        return dataclasses.replace(dealt, alphas={**self.alphas, **alphas})

    def build(self, base: Base) -> LoRAAdapter:
        scaling = self.scaling_at(base.path)
        A, B, taken_off = starts.begin(self.begins(), base, self.rank_at(base.path), scaling)
        bias = base.parameter(base.channels_out) if self.bias else None
        return LoRAAdapter(A, B, scaling, dropout=self.dropout, bias=bias, taken_off=taken_off)


class LoRAAdapter(Adapter):
    """A: (rank, d_in), B: (d_out, rank), bias: (d_out,) or None; A0, B0: both at the start, where they are taken off.

    A factor that is no parameter is frozen.

    B A - B0 A0 is computed as (B - B0) A + B0 (A - A0), one product of twice the rank: it is exactly zero at the start,
    and in 16 bits the small differences keep their own precision.
    """

    additive = True
    A: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        dropout: float = 0.0,
        bias: nn.Parameter | None = None,
        taken_off: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        A0, B0 = taken_off or (None, None)
        self.hold(A=A, B=B, A0=A0, B0=B0)
        self.bias, self.scaling, self.dropout = bias, scaling, dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A' (k, d_in) and B' (d_out, k) of what is added, scaling * B' A' x; k is rank or twice that."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        more = self.bias is not None or (self.training and self.dropout)
        return None if more else (*self.factors(), self.scaling)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = add_low_rank(x, base, *self.factors(), self.scaling, dropout=self.dropout * self.training)
        if self.bias is None:
            return y
        return base.outputs_back(base.outputs_last(y) + self.scaling * self.bias.to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = (factor.to(weight.dtype) for factor in self.factors())
        folded = weight + self.scaling * (B @ A)
        if self.bias is None:
            return folded, bias
        more = self.scaling * self.bias.to(weight.dtype)
        return folded, more if bias is None else bias + more


def add_low_rank(x: Tensor, base: Base, A: Tensor, B: Tensor, scaling: float, *, dropout: float) -> Tensor:
    """Return base(x) + scaling * B A x, where each input feature of A is zeroed with probability ``dropout``."""
    if not dropout:
        return base.add_low_rank(x, A, B, scaling)
    A, B = A.to(base.dtype), B.to(base.dtype)
    if base.channels_in is None:
        # Indices cannot be thinned: drop features of A x instead.
        rank_last = base.low_rank(x, A, torch.eye(A.shape[0], dtype=A.dtype, device=A.device))
        return base(x) + scaling * F.linear(F.dropout(rank_last, dropout), B)
    return base(x) + scaling * base.low_rank(F.dropout(x, dropout), A, B)
