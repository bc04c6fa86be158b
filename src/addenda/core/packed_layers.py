"""Linear layers that keep their weight packed, and do the products of the frozen weight themselves."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from addenda.core.lowrank import FrozenLinear
from addenda.core.views import CompressedView

__all__ = ["PackedLinear", "PackedView", "packed_numel"]


@runtime_checkable
class PackedLinear(FrozenLinear, Protocol):
    """What a module has to offer to be adapted, fused with its adapter, as a packed linear layer.

    The products of :class:`FrozenLinear` take rows in ``compute_dtype`` and return them in it. ``linear`` adds the
    module's ``bias``, where it has one, of shape (out_features,). ``forward`` gives for ``(..., in_features)`` what
    ``linear`` gives for the rows and is differentiable in its input: :func:`~addenda.core.lowrank.frozen_linear`
    makes it so from the two products. All that the weight consists of are the module's own parameters and buffers.
    """

    in_features: int
    out_features: int

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""

    def dequantized(self, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as a dense (out_features, in_features) matrix, made anew; or the rows of an index alone.

        In ``compute_dtype`` where no ``dtype`` is given.
        """


def packed_numel(model: nn.Module) -> int:
    """Return how many numbers a model keeps packed: those of modules that state a ``packed_shape``.

    Layers that share their bytes count once.
    """
    held: dict[int, int] = {}
    for module in model.modules():
        shape = getattr(module, "packed_shape", None)
        if shape is not None:
            held[next(module.buffers(recurse=False)).data_ptr()] = math.prod(shape)
    return sum(held.values())


class PackedView(CompressedView):
    """A packed linear layer: everything is asked of the module itself."""

    kind = "packed-linear"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.module.compute_dtype
        return dtype

    def weight(self) -> Tensor:
        weight: Tensor = self.module.dequantized()
        return weight.detach()

    def exact_weight(self) -> Tensor:
        weight: Tensor = self.module.dequantized(dtype=torch.promote_types(self.dtype, torch.float32))
        return weight.detach()

    def linear(self, x: Tensor) -> Tensor:
        y: Tensor = self.module.linear(x)
        return y

    def grad_input(self, g: Tensor) -> Tensor:
        dx: Tensor = self.module.grad_input(g)
        return dx

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        summed: Tensor = self.module.add_grad_input(total, g)
        return summed

    def _runs_the_plain_product(self) -> bool:
        return True
