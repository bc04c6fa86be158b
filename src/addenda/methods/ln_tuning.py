"""LN-tuning: train only the norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from addenda.core.contract import Base, Method
from addenda.core.ranges import flag
from addenda.core.registry import register
from addenda.core.whole import WholeAdapter, whole_adapter

__all__ = ["LNTuning"]


@register("ln-tuning")
@dataclass(frozen=True)
class LNTuning(Method):
    """Train the gains and shifts of the norms and nothing else.

    y = n(x) * (g + G) + s + S,   G, S: (channels,)

    n(x) is the standardised input, g and s are the norm's own gain and shift. G and S start at zero, so the adapted
    layer starts equal to its base. Mergeable exactly. Parameters: channels per norm, twice that where it has a shift.

    Args:
        biases: train the shifts too, of norms that have them.

    Cost: one addition of two vectors per norm and step. An adapted norm runs in its own form and not in a fused one,
    so that training keeps its input once more.

    Use it when: the parameters have to be few and the task asks for what the base can do already; the paper turns
    language models to images so.

    Learning rate: 1e-2 is chosen, not tuned: gains are near one, and a rate that suits matrices hardly moves them.

    Differs from: the paper and PEFT train the values themselves; this trains the change, which is the same but for
    weight decay, which pulls towards the base. Batch and group norms can be adapted too.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
        >>> addenda.attach(model, LNTuning()).trainable_parameters
        8

    References: Zhao et al. 2023, arXiv:2312.11420, section 2.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({}, {"biases": False})

    biases: bool = True
    """Train the shifts too."""

    def problems(self) -> list[str]:
        return flag("biases", self.biases)

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return "all-norms"

    def build(self, base: Base) -> WholeAdapter:
        return whole_adapter(base, with_bias=self.biases)
