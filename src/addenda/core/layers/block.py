"""A feed-forward block as one layer, for methods that work on its input and output."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.layers.dense import DENSE
from addenda.core.layers.kind import LayerKind
from addenda.core.views import LayerView
from addenda.errors import MethodError

__all__ = ["BLOCK"]


class BlockView(LayerView):
    """A feed-forward block: a module of linear layers that maps features to features of the same width.

    It has no single weight, so only methods that work on activations can stand on it.
    """

    kind = "block"

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        views = [view for child in _linear_children(module) if (view := _leaf_view(child, path))]
        self._first, self._last = views[0], views[-1]
        self.input_name = list(inspect.signature(self.original.forward).parameters)[1]

    @property
    def d_in(self) -> int:
        return self._first.d_in

    @property
    def d_out(self) -> int:
        return self._last.d_out

    @property
    def has_bias(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    def weight(self) -> Tensor:
        raise self._no_weight()

    def bias(self) -> Tensor | None:
        raise self._no_weight()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise self._no_weight()

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        raise self._no_weight()

    def _no_weight(self) -> MethodError:
        return MethodError(
            f"block '{self.path}' has no single weight",
            hint="target the linear layers inside it, or use a method that works on activations",
        )


def _is_block(module: nn.Module) -> bool:
    linear = _linear_children(module)
    if len(linear) < 2 or any(list(child.children()) for child in module.children() if child not in linear):
        return False
    first, last = _leaf_view(linear[0], ""), _leaf_view(linear[-1], "")
    return first is not None and last is not None and first.d_in == last.d_out != first.d_out


def _linear_children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if (kind := _leaf_kind(child)) and kind.linear]


def _leaf_kind(module: nn.Module) -> LayerKind | None:
    return next((k for k in DENSE if k.matches(module)), None)


def _leaf_view(module: nn.Module, path: str) -> LayerView | None:
    kind = _leaf_kind(module)
    return kind.view(module, path) if kind and kind.linear else None


BLOCK = LayerKind("block", _is_block, BlockView)
