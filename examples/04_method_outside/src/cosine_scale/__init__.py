"""Scale the output channels of a layer by a smooth curve: a few cosines over the channels, each with a trained weight.

Made up as an example of a method in a package of its own; no paper recommends it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core import Adapter, Base, Method
from addenda.core.registry import register


@register("cosine-scale")
@dataclass(frozen=True)
class CosineScale(Method):
    """Scale each output channel by a curve of a few cosines: train their weights z.

    y_i = base(x)_i * (1 + sum_k z_k cos(pi k (i + 1/2) / channels)),   k = 0 ... terms - 1,   z: (terms,)

    z starts at zero, so the start is the base. Mergeable. Parameters: terms per layer.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[dict[str, object], ...]] = ({"terms": 4}, {"terms": 16})

    terms: int = 8
    """Cosines in the curve, 1 <= terms <= the layer's output channels."""

    def problems(self) -> list[str]:
        return [] if self.terms >= 1 else [f"terms is {self.terms}, but has to be at least 1"]

    def problems_at(self, base: Base) -> list[str]:
        few = base.channels_out < self.terms
        return [f"{self.terms} terms are more than the {base.channels_out} output channels"] if few else []

    def build(self, base: Base) -> Adapter:
        return CosineScaleAdapter(base.parameter(self.terms), base.channels_out)


class CosineScaleAdapter(Adapter):
    def __init__(self, z: nn.Parameter, channels: int) -> None:
        super().__init__()
        self.z = z
        self.channels = channels

    def scale(self) -> Tensor:
        """The factor of each channel: (channels,)."""
        place = torch.arange(self.channels, device=self.z.device, dtype=self.z.dtype) + 0.5
        wave = torch.arange(len(self.z), device=self.z.device, dtype=self.z.dtype)
        return 1 + torch.cos(math.pi / self.channels * place[:, None] * wave) @ self.z

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base.outputs_last(base(x))
        return base.outputs_back(y * self.scale().to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale().to(weight.dtype)
        return weight * scale[:, None], None if bias is None else bias * scale
