"""Norms as a method sees them: one gain, and often one shift, for each feature of the standardised input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.views import LayerView

__all__ = ["NormView", "is_norm"]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: it holds one gain a feature, a shift at most, and an epsilon.

    Layer, RMS, batch, group and instance norms all do, whoever wrote them.

    Example:
        >>> is_norm(nn.LayerNorm(8)), is_norm(nn.LayerNorm(8, elementwise_affine=False)), is_norm(nn.PReLU(8))
        (True, False, False)
    """
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or set(module._modules) - {"adapters"}:
        return False
    has_epsilon = hasattr(module, "eps") or hasattr(module, "variance_epsilon")
    return weight.dim() == 1 and has_epsilon and set(module._parameters) <= {"weight", "bias"}


class NormView(LayerView):
    """A norm: weight (d,), shown as (d, 1), as that of a convolution of size one in which each channel is a group.

    How the input is standardised is the layer's own affair, and so is a gain of one plus the weight: another weight is
    tried by running the layer as if it held it.
    """

    kind = "norm"

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        self.input_name = list(inspect.signature(self.original.forward).parameters)[1]

    @property
    def channels_in(self) -> int | None:
        return self.d_out

    @property
    def groups(self) -> int:
        return self.d_out

    @property
    def bias_possible(self) -> bool:
        return "bias" in self.module._parameters

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored[:, None]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix[:, 0]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.as_if(x, weight, bias)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        weight = B @ A
        # The difference, because a norm whose gain is one plus its weight does not give zero for a weight of zero.
        return self.apply(x, weight) - self.apply(x, torch.zeros_like(weight))

    def is_plain(self) -> bool:
        return True  # `apply` is the layer's own forward

    def inputs_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self._channels_first else x

    def inputs_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self._channels_first else x

    def outputs_last(self, y: Tensor) -> Tensor:
        return self.inputs_last(y)

    def outputs_back(self, y: Tensor) -> Tensor:
        return self.inputs_back(y)

    @property
    def _channels_first(self) -> bool:
        return hasattr(self.module, "num_features") or hasattr(self.module, "num_channels")
