"""DeLoRA: the direction of a low-rank update apart from its strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base
from addenda.core.products import ProductAdapter, kaiming_uniform
from addenda.core.ranges import number, table
from addenda.core.ranked import Ranked
from addenda.core.registry import register
from addenda.core.targets import at

__all__ = ["DeLoRA"]

_SMALLEST_NORM = 1e-4


@register("delora")
@dataclass(frozen=True)
class DeLoRA(Ranked):
    """Decoupled low-rank adaptation: every rank-one part of the update is normalized, one number scales them all.

    y = base(x) + B D A (w * x),   D = diag(strength / (rank * |A_i| * |B_i|)),  A: (rank, d_in),  B: (d_out, rank)

    A_i is a row of A, B_i a column of B, w: (d_in,) the norms of the weight's columns, kept as they were; norms below
    1e-4 count as that. The strength is trained. A starts Kaiming-uniform and B zero, so the adapted layer starts equal
    to its base. Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out) + 1 per layer.

    Without w the update's Frobenius norm is at most the strength, whatever A and B become: a high learning rate or a
    long training turns the update, and does not blow it up.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        strength: initial value of the bound, > 0.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        strengths: another strength likewise.

    **Cost**: LoRA's of the same rank, and 4 * rank * (d_in + d_out) FLOP a forward for the norms. **Use it when** the
    learning rate cannot be tuned, or the training is long. As B starts at zero, the first step takes the update
    to its full strength in the direction that this step finds: warm the rate up, or start with a lower strength.

    **Learning rate**: 1e-4, the rate under which PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B)
    runs it. **Strength**: 15 is for wide layers. On MiniLM, whose layers have 384 features, it broke the encoder at
    every rate, and of strength 1 it did as well as LoRA at 1e-2 (benchmarks/methods_quality).

    **Differs from**: nothing in the formula. Starting at B = 0 with a least norm is PEFT's way to start at the base.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, DeLoRA(rank=2), targets=["0"]).trainable_parameters
        25

    References: Bini et al. 2025, arXiv:2503.18225.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    # The modest strength first: at the usual one a random little model trains chaotically, and a run on it multiplies
    # the rounding of the first step by 20 in each that follows.
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 6, "strength": 0.5}, {"rank": 3})

    rank: int = 8
    """Inner dimension of the update."""
    strength: float = 15.0
    """Initial bound of the update."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Strength for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        found = super().problems() + _positive("strength", self.strength)
        return found + table("strengths", self.strengths, _positive)

    def tables(self) -> dict[str, Mapping[str, float]]:
        return {**super().tables(), "strengths": self.strengths}

    def strength_at(self, path: str) -> float:
        """Return the initial strength that applies to the layer at ``path``."""
        return at(path, self.strengths, self.strength)

    def build(self, base: Base) -> DeLoRAAdapter:
        def norms(tensor: Tensor, _: torch.Generator) -> None:
            tensor.copy_(base.weight().to(tensor.dtype).norm(dim=0))

        rank = self.rank_at(base.path)
        return DeLoRAAdapter(
            base.parameter(rank, base.d_in, init=kaiming_uniform),
            base.parameter(base.d_out, rank),
            base.parameter(1, init=self.strength_at(base.path)),
            norms=base.constant(base.d_in, init=norms),
        )


def _positive(name: str, value: object) -> list[str]:
    return number(name, value, above=0.0)


class DeLoRAAdapter(ProductAdapter):
    """A: (rank, d_in), B: (d_out, rank), strength: (1,), norms: (d_in,), the last of them frozen."""

    norms: Tensor

    def __init__(self, A: nn.Parameter, B: nn.Parameter, strength: nn.Parameter, *, norms: Tensor) -> None:
        super().__init__()
        self.A, self.B, self.strength = A, B, strength
        self.register_buffer("norms", norms)

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        lengths = [t.clamp(min=_SMALLEST_NORM) for t in (self.A.norm(dim=1), self.B.norm(dim=0))]
        scale = self.strength / (len(self.A) * lengths[0] * lengths[1])
        return self.A * self.norms, self.B * scale, 1.0
