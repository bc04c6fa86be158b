"""RoAd: rotary adaptation, a rotation and scaling of pairs of output features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer
from addenda.core.registry import register

__all__ = ["RoAd"]

_VARIANTS = (1, 2, 4)


@register("road")
@dataclass(frozen=True)
class RoAd(Method):
    """Turn and scale the layer's output in pairs of features, by an angle and a factor each.

    y_i = a cos(t) z_i - a sin(t) z_j,   y_j = a sin(t) z_i + a cos(t) z_j,   z = base(x)

    j is the partner of i, half a group further on. The angles t start at zero and the factors a at one, so the adapted
    layer starts equal to its base. Mergeable exactly into rows of the weight and the bias.
    Parameters: variant * d_out per layer.

    Args:
        variant: 1, one angle and factor for each pair, a true rotation but for the factor; 2, one for each feature; 4,
            one for each of the two terms of each feature.
        group_size: how many neighbours form a group, whose first half is paired with its second; even, and it divides
            the layer's output features. It changes which features are paired, not how many numbers are trained.

    **Cost:** two multiplications and an addition for each output feature, no product of matrices: less than LoRA of
    rank 1. It keeps the layer's output.

    **Use it when** many adapters have to run side by side, or a few numbers per feature suffice.

    **Learning rate:** 1e-3, that of PEFT's published comparison on MetaMathQA (Llama 3.2 3B) for it; not tuned here.
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 1e-2.

    Differs from: nothing that is known; pairs are formed as in PEFT, within groups, which the paper does not have.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, RoAd(variant=2, group_size=4), targets=["0"]).trainable_parameters
        8

    References: Liao and Monz 2024, arXiv:2409.00119.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = tuple(
        {"variant": variant, "group_size": 4} for variant in _VARIANTS
    )

    variant: int = 1
    """1, 2 or 4."""
    group_size: int = 64
    """Neighbours in which pairs are formed."""

    def problems(self) -> list[str]:
        found = integer("group_size", self.group_size, least=2)
        if not found and self.group_size % 2:
            found.append(f"group_size must be even, got {self.group_size}")
        if self.variant not in _VARIANTS or isinstance(self.variant, bool):
            found.append(f"variant must be one of 1, 2, 4, got {self.variant!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        features = base.channels_out
        if features % self.group_size == 0:
            return []
        return [f"group_size {self.group_size} does not divide its {features} output features"]

    def build(self, base: Base) -> RoAdAdapter:
        shape = base.channels_out // self.group_size, self.variant * self.group_size // 2
        return RoAdAdapter(base.parameter(*shape), base.parameter(*shape, init=1.0), self)


class RoAdAdapter(Adapter):
    """theta: (groups, variant * group_size / 2), radians; alpha: likewise."""

    def __init__(self, theta: nn.Parameter, alpha: nn.Parameter, settings: RoAd) -> None:
        super().__init__()
        self.theta, self.alpha = theta, alpha
        self.variant, self.pairs = settings.variant, settings.group_size // 2

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return by what a feature and its turned partner are multiplied: (d_out,) each."""
        keep, turn = self.alpha * self.theta.cos(), self.alpha * self.theta.sin()
        if self.variant == 1:
            keep, turn = keep.repeat(1, 2), turn.repeat(1, 2)
        elif self.variant == 4:
            keep, turn = keep[:, : 2 * self.pairs], turn[:, 2 * self.pairs :]
        return keep.flatten(), turn.flatten()

    def turned(self, z: Tensor) -> Tensor:
        """Return the rows z: (..., d_out) adapted."""
        keep, turn = (column.to(z.dtype) for column in self.columns())
        first, second = torch.unflatten(z, -1, (-1, 2, self.pairs)).unbind(-2)
        return z * keep + torch.stack((-second, first), -2).flatten(-3) * turn

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.outputs_back(self.turned(base.outputs_last(base(x))))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turned(weight.t()).t(), None if bias is None else self.turned(bias)
