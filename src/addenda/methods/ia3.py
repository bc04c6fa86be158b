"""(IA)3: rescaling of inner activations by learned vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import suffixes
from addenda.core.registry import register
from addenda.core.targets import (
    ATTENTION_OUTPUTS,
    FEED_FORWARD_OUTPUTS,
    KEYS_AND_VALUES,
    matches,
    suffixes_present,
    unmatched,
)

__all__ = ["IA3"]


@register("ia3")
@dataclass(frozen=True)
class IA3(Method):
    """Rescale activations by a learned vector: keys and values after, feed-forward inside.

    y = l * base(x)            l: (channels_out,)   on keys, values and any other target
    y = base(l * x)            l: (channels_in,)    on the second layer of the feed-forward block

    l starts at one, so the adapted layer starts equal to its base. Mergeable exactly: the vector scales the rows, or
    the columns, of the weight.

    Args:
        feed_forward: literal suffixes of the layers whose input is scaled instead of their output.

    Differs from: PEFT needs the feed-forward layers listed among the targets of each model; here well-known names
    are the default, and other targets are scaled at their output.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, IA3(), targets=["0"]).trainable_parameters
        4

    References: Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({}, {"feed_forward": ("layer",)})

    feed_forward: tuple[str, ...] = FEED_FORWARD_OUTPUTS
    """Suffixes of the layers scaled at their input."""

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        keys_and_values = suffixes_present(paths, KEYS_AND_VALUES)
        return keys_and_values + self._feed_forward_in(paths) or "all-linear"

    def _feed_forward_in(self, paths: Sequence[str]) -> list[str]:
        asked = [suffix for suffix in self.feed_forward if suffix not in FEED_FORWARD_OUTPUTS]
        known = [suffix for suffix in self.feed_forward if suffix in FEED_FORWARD_OUTPUTS]
        return suffixes_present(paths, asked) + suffixes_present(paths, known, without=ATTENTION_OUTPUTS)

    def problems(self) -> list[str]:
        return suffixes("feed_forward", self.feed_forward)

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        asked = [suffix for suffix in self.feed_forward if suffix not in FEED_FORWARD_OUTPUTS]
        return [f"feed_forward names no target by '{suffix}'" for suffix in unmatched(paths, asked)]

    def problems_at(self, base: Base) -> list[str]:
        if self._at_input(base) and (base.channels_in is None or base.groups > 1):
            return ["its input cannot be scaled channel by channel in the weight"]
        return []

    def build(self, base: Base) -> IA3Adapter:
        at_input = self._at_input(base)
        size = base.channels_in if at_input and base.channels_in else base.channels_out
        return IA3Adapter(base.parameter(size, init=1.0), at_input=at_input)

    def _at_input(self, base: Base) -> bool:
        return any(matches(base.path, suffix) for suffix in self.feed_forward)


class IA3Adapter(Adapter):
    """scale: (channels_out,) or, at the input, (channels_in,)."""

    def __init__(self, scale: nn.Parameter, *, at_input: bool) -> None:
        super().__init__()
        self.scale, self.at_input = scale, at_input

    def forward(self, x: Tensor, base: Base) -> Tensor:
        scale = self.scale.to(base.dtype)
        if self.at_input:
            return base(base.inputs_back(base.inputs_last(x) * scale))
        return base.outputs_back(base.outputs_last(base(x)) * scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.to(weight.dtype)
        if self.at_input:
            return weight * scale.repeat_interleave(weight.shape[1] // scale.shape[0]), bias
        return weight * scale[:, None], None if bias is None else bias * scale
