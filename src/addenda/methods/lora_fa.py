"""LoRA-FA: LoRA with a frozen A, so that a layer's input need not be kept for the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from addenda.core.contract import Base
from addenda.core.products import kaiming_uniform
from addenda.core.registry import register
from addenda.methods.lora import LoRAAdapter, LowRank

__all__ = ["LoRAFA"]


@register("lora-fa")
@dataclass(frozen=True)
class LoRAFA(LowRank):
    """Low-rank update of a weight whose inner projection stays as it was drawn: train B, keep A and W.

    y = base(x) + scaling * B (A x),   A: (rank, d_in), frozen,  B: (d_out, rank)

    A is drawn Kaiming-uniform and B starts at zero, so the adapted layer starts equal to its base. Mergeable exactly
    into an unquantized weight. Parameters: rank * d_out per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.

    **Cost**: LoRA's forward; the backward saves one product, and a layer keeps A x (rank numbers a token) where LoRA
    keeps its input (d_in numbers), if nothing else needs that.
    **Use it when** the memory of activations limits what fits, and the update may be confined to a random subspace.
    **Learning rate**: LoRA's default; not tuned.

    Differs from: the paper draws A from a Gaussian, this Kaiming-uniform as LoRA. PEFT has LoRA-FA as an optimizer
    that also turns B's gradient; this is the paper's, where B gets its plain gradient.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, LoRAFA(rank=2), targets=["0"]).trainable_parameters
        8

    References: Zhang et al. 2023, arXiv:2308.03303, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 4}, {"rank": 3, "alpha": 5.0})

    def build(self, base: Base) -> LoRAAdapter:
        rank, scaling = self.rank_at(base.path), self.scaling_at(base.path)
        A, B = base.constant(rank, base.d_in, init=kaiming_uniform), base.parameter(base.d_out, rank)
        return LoRAAdapter(A, B, scaling, dropout=self.dropout)
