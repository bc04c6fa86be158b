"""HiRA: an update of high rank, the weight itself multiplied element by element with a low-rank matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from addenda.core.contract import Adapter, Base
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import number
from addenda.core.ranked import Ranked
from addenda.core.registry import register

__all__ = ["HiRA"]


@register("hira")
@dataclass(frozen=True)
class HiRA(Ranked):
    """Update a weight by its own elements times a low-rank matrix.

    y = base(x) + (W * (B A)) x,   * element by element,  A: (rank, d_in),  B: (d_out, rank)

    The update has up to the rank of W times ``rank``. A starts Kaiming-uniform and B zero, so the adapted layer starts
    equal to its base. Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out) per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        dropout: probability of zeroing an input feature of the update during training, in [0, 1); without effect on
            an embedding, whose input holds indices.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.

    **Cost**: another product as large as the base's, and W * (B A) formed once a forward, (2 * rank + 1) * d_in *
    d_out FLOP, and again in the backward instead of being kept; a packed weight is unpacked for it. LoRA needs none of
    this: expect several times its time over short batches.
    **Use it when** the task asks for an update of high rank at LoRA's size of file, and training time is no concern.
    **Learning rate**: 1e-2, above LoRA's, because B A is a share of each weight and not an amount; not tuned.

    Differs from: nothing in the formula. PEFT keeps W * (B A) for the backward.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, HiRA(rank=2), targets=["0"]).trainable_parameters
        24

    References: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
    ICLR 2025, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 4},)

    rank: int = 32
    """Inner dimension of the factor."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the update during training."""

    def problems(self) -> list[str]:
        return super().problems() + number("dropout", self.dropout, least=0.0, below=1.0)

    def build(self, base: Base) -> HiRAAdapter:
        rank = self.rank_at(base.path)
        A = base.parameter(rank, base.d_in, init=kaiming_uniform)
        return HiRAAdapter(A, base.parameter(base.d_out, rank), self.dropout)


class HiRAAdapter(Adapter):
    """A: (rank, d_in), B: (d_out, rank)."""

    additive = reads_weight = True

    def __init__(self, A: nn.Parameter, B: nn.Parameter, dropout: float) -> None:
        super().__init__()
        self.A, self.B, self.dropout = A, B, dropout

    def forward(self, x: Tensor, base: Base) -> Tensor:
        thinned = x
        if self.training and self.dropout and base.channels_in is not None:
            thinned = F.dropout(x, self.dropout)

        def update(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return base.apply(x, base.weight() * (B.to(base.dtype) @ A.to(base.dtype)))

        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Kept for the backward, the product would be a matrix as large as the weight in every layer.
            y: Tensor = checkpoint(
                update, thinned, self.A, self.B, use_reentrant=False, preserve_rng_state=False
            )
            return base(x) + y
        return base(x) + update(thinned, self.A, self.B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * (self.B.to(weight.dtype) @ self.A.to(weight.dtype)), bias
