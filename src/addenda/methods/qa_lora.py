"""QA-LoRA: a low-rank update of sums over groups of inputs, fit for weights that are quantized in such groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from addenda.core.contract import Base
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.methods.lora import LoRAAdapter, LowRank

__all__ = ["QALoRA"]


@register("qa-lora")
@dataclass(frozen=True)
class QALoRA(LowRank):
    """Low-rank update that sees each group of neighbouring inputs only as its sum.

    y = base(x) + scaling * B (A s),   s_g: sum of the inputs of group g,   A: (rank, groups),  B: (d_out, rank)

    groups = d_in / group_size. A starts Kaiming-uniform and B zero, so the adapted layer starts equal to its base. The
    update of the weight is the same for all inputs of a group, so that, in a weight quantized group by group, it
    changes nothing but the groups' zero points. Mergeable exactly into an unquantized weight. Parameters: rank *
    (groups + d_out) per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out); beyond the number of groups it adds nothing.
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.
        group_size: inputs to a group, >= 1, a divisor of d_in; that of the quantized base.

    **Cost**: LoRA's: A is repeated over its groups, and one fused product reads each input once.

    **Use it when** the base is quantized group by group with zero points of its own and the adapted model is to be
    quantized just so.

    **Learning rate**: LoRA's default; not tuned.

    **Differs from**: nothing is written into zero points here: a quantized layer keeps its adapter beside it. PEFT, for
    GPTQ's layers alone, multiplies the mean of a group by the number of groups where the paper has the group's size.

    Example:
        >>> import addenda, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> addenda.attach(model, QALoRA(rank=2, group_size=4), targets=["0"]).trainable_parameters
        12

    References: Xu et al. 2023, arXiv:2309.14717.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4, "group_size": 4},
        {"rank": 3, "group_size": 2, "alpha": 5.0},
    )

    group_size: int = 32
    """Inputs to a group."""

    def problems(self) -> list[str]:
        return super().problems() + integer("group_size", self.group_size)

    def problems_at(self, base: Base) -> list[str]:
        odd = f"group_size {self.group_size} does not divide d_in {base.d_in}"
        return super().problems_at(base) + ([odd] if base.d_in % self.group_size else [])

    def build(self, base: Base) -> QALoRAAdapter:
        rank, groups = self.rank_at(base.path), base.d_in // self.group_size
        A, B = base.parameter(rank, groups, init=kaiming_uniform), base.parameter(base.d_out, rank)
        adapter = QALoRAAdapter(A, B, self.scaling_at(base.path), dropout=self.dropout)
        adapter.group_size = self.group_size
        return adapter


class QALoRAAdapter(LoRAAdapter):
    """A: (rank, d_in / group_size), B: (d_out, rank)."""

    group_size: int = 1

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.repeat_interleave(self.group_size, dim=1), self.B
