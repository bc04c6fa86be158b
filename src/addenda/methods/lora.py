"""LoRA: low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import flag, integer, number, suffixes
from addenda.core.registry import register
from addenda.core.targets import matches, unmatched

__all__ = ["LoRA"]


@register("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank update of a weight: train B A, keep W.

    y = base(x) + scaling * B (A x),   A: (rank, d_in),  B: (d_out, rank)

    scaling = alpha / rank, or alpha / sqrt(rank) when rank-stabilized. A starts Kaiming-uniform and B zero, so the
    adapted layer starts equal to its base. Mergeable exactly into an unquantized weight.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out). Parameters: rank * (d_in + d_out) per layer.
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank, that is a scaling of 2 at any rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank, so that the size of the update does not fall
            with the rank.
        ranks: another rank for the layers a literal suffix names, such as ``{"down_proj": 32}``; the last that
            matches counts.
        alphas: another alpha likewise.

    Differs from: the paper initializes A with a Gaussian; the official code, PEFT and this use Kaiming-uniform.
    PEFT's default alpha is 8 whatever the rank. PEFT keys per-layer ranks by regular expressions, this by suffixes.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, LoRA(rank=2), targets=["0"]).trainable_parameters
        24

    References: Hu et al. 2021, arXiv:2106.09685, section 4.1. Kalajdzievski 2023, arXiv:2312.03732 (rank-stabilized).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {},
        {"rank": 3, "alpha": 5.0, "rank_stabilized": True},
    )

    rank: int = 16
    """Inner dimension of the update."""
    alpha: float | None = None
    """Numerator of the scaling; None means 2 * rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of A during training."""
    rank_stabilized: bool = False
    """Divide alpha by sqrt(rank) instead of rank."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank for the layers a literal suffix names."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Alpha for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + number("dropout", self.dropout, least=0.0, below=1.0)
        found += flag("rank_stabilized", self.rank_stabilized)
        if self.alpha is not None:
            found += number("alpha", self.alpha, above=0.0)
        for name, table in (("ranks", self.ranks), ("alphas", self.alphas)):
            if not isinstance(table, Mapping):
                return [*found, f"{name} must map suffixes to numbers, got {table!r}"]
            found += suffixes(f"keys of {name}", list(table))
        for suffix, rank in self.ranks.items():
            found += integer(f"ranks[{suffix!r}]", rank)
        for suffix, alpha in self.alphas.items():
            found += number(f"alphas[{suffix!r}]", alpha, above=0.0)
        return found

    def problems_at(self, base: Base) -> list[str]:
        rank, limit = self.rank_at(base.path), min(base.d_in, base.d_out)
        return [f"rank {rank} exceeds min(d_in, d_out) = {limit}"] if rank > limit else []

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        tables = {"ranks": self.ranks, "alphas": self.alphas}
        return [
            f"{name} names no target by '{suffix}'"
            for name, table in tables.items()
            for suffix in unmatched(paths, table)
        ]

    def rank_at(self, path: str) -> int:
        """Return the rank that applies to the layer at ``path``."""
        return int(_at(self.ranks, path, self.rank))

    def scaling_at(self, path: str) -> float:
        """Return the scaling that applies to the layer at ``path``."""
        rank = self.rank_at(path)
        alpha = _at(self.alphas, path, 2.0 * rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def build(self, base: Base) -> LoRAAdapter:
        rank = self.rank_at(base.path)
        A = base.parameter(rank, base.d_in, init=_kaiming_uniform)
        return LoRAAdapter(A, base.parameter(base.d_out, rank), self.scaling_at(base.path), self.dropout)


def _at(overrides: Mapping[str, float], path: str, default: float) -> float:
    found = [value for suffix, value in overrides.items() if matches(path, suffix)]
    return found[-1] if found else default


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


class LoRAAdapter(Adapter):
    """A: (rank, d_in), B: (d_out, rank)."""

    additive = True

    def __init__(self, A: nn.Parameter, B: nn.Parameter, scaling: float, dropout: float) -> None:
        super().__init__()
        self.A, self.B = A, B
        self.scaling, self.dropout = scaling, dropout

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.training and self.dropout else (self.A, self.B, self.scaling)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.low_rank_term() is not None:
            return base.add_low_rank(x, self.A, self.B, self.scaling)
        A, B = self.A.to(base.dtype), self.B.to(base.dtype)
        if base.channels_in is None:
            # Indices cannot be thinned: drop features of A x instead.
            rank_last = base.low_rank(x, A, torch.eye(A.shape[0], dtype=A.dtype, device=A.device))
            return base(x) + self.scaling * F.linear(F.dropout(rank_last, self.dropout), B)
        return base(x) + self.scaling * base.low_rank(F.dropout(x, self.dropout), A, B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * (self.B.to(weight.dtype) @ self.A.to(weight.dtype)), bias
