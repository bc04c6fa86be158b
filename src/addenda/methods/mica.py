"""MiCA: a low-rank update that writes into the directions in which the weight does least, and trains A alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.registry import register
from addenda.core.starts import wide_weight
from addenda.methods.lora import LoRAAdapter, LowRank

__all__ = ["MiCA"]


@register("mica")
@dataclass(frozen=True)
class MiCA(LowRank):
    """Low-rank update into the weight's minor directions: train A, keep B and W.

    y = base(x) + scaling * B (A x),   A: (rank, d_in),   B: (d_out, rank), frozen: the last columns of U,   W = U S V^T

    B holds the left singular vectors of the ``rank`` smallest singular values among the min(d_in, d_out) largest there
    are, and A starts at zero, so the adapted layer starts equal to its base. Mergeable exactly into an unquantized
    weight. Parameters: rank * d_in per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.

    **Cost**: LoRA's, with one product fewer in the backward; and once a decomposition of each weight, about 10 *
    d_out * d_in * min(d_out, d_in) FLOP.

    **Use it when** what is new should be added beside what the base knows: its large directions are not written to.

    **Learning rate**: LoRA's default; not tuned.

    **Differs from**: nothing in PEFT, which keeps it under LoRA as a start with a frozen B.

    Example:
        >>> import addenda
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> addenda.attach(model, MiCA(rank=2), targets=["0"]).trainable_parameters
        16

    References: arXiv:2604.01694.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 4}, {"rank": 3, "alpha": 5.0})

    def build(self, base: Base) -> LoRAAdapter:
        rank = self.rank_at(base.path)
        B = base.constant(base.d_out, rank, init=lambda t, _: t.copy_(minor(wide_weight(base), rank)))
        A = base.parameter(rank, base.d_in)
        return LoRAAdapter(A, B, self.scaling_at(base.path), dropout=self.dropout)


def minor(weight: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors of the least singular values of ``weight`` (d_out, d_in), as (d_out, rank)."""
    U: Tensor = torch.linalg.svd(weight, full_matrices=False).U
    return U[:, -rank:]
