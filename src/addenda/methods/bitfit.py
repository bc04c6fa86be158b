"""BitFit: train only biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import flag
from addenda.core.registry import register

__all__ = ["BitFit"]


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """Train a shift of each layer's bias and nothing else.

    y = base(x) + b,   b: (channels_out,)

    b starts at zero, so the adapted layer starts equal to its base. Mergeable exactly into the bias.

    Args:
        create: also adapt layers that have no bias of their own; merging then gives them one. When False, such a
            target is an error.

    Differs from: the paper trains all biases that a model has, those of its layer norms too. Without targets this
    adapts the linear layers alone; targets of ``["all-linear", "all-norms"]`` take the norms along. It trains an
    offset beside the bias, so that the base stays untouched, and gives bias-free linear layers (Llama and its kin) an
    offset where the paper has nothing to train. A norm whose form has no bias, as an RMS norm's, gets none.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, BitFit(), targets=["0"]).trainable_parameters
        4

    References: Ben Zaken et al. 2021, arXiv:2106.10199, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv", "norm")

    create: bool = True
    """Adapt layers that have no bias too."""

    def problems(self) -> list[str]:
        return flag("create", self.create)

    def problems_at(self, base: Base) -> list[str]:
        if base.has_bias:
            return []
        if not base.bias_possible:
            return ["it has no bias and no place for one"]
        return [] if self.create else ["it has no bias (create=True gives it one)"]

    def build(self, base: Base) -> BitFitAdapter:
        return BitFitAdapter(base.parameter(base.channels_out))


class BitFitAdapter(Adapter):
    """offset: (channels_out,)."""

    additive = True

    def __init__(self, offset: nn.Parameter) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.outputs_back(base.outputs_last(base(x)) + self.offset.to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        offset = self.offset.to(weight.dtype)
        return weight, offset.clone() if bias is None else bias + offset
