"""A feed-forward block as one layer, for methods that work on its input and output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from addenda.core.blocks import WeightlessView
from addenda.core.layers.dense import DENSE
from addenda.core.layers.kind import LayerKind
from addenda.core.views import LayerView

__all__ = ["BLOCK"]


class BlockView(WeightlessView):
    """A feed-forward block: a module of linear layers that maps features to features of the same width."""

    kind = "block"
    called = "block"

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        views = [view for child in _linear_children(module) if (view := _leaf_view(child, path))]
        self._first, self._last = views[0], views[-1]

    @property
    def d_in(self) -> int:
        return self._first.d_in

    @property
    def d_out(self) -> int:
        return self._last.d_out

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype


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
