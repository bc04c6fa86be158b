"""PEFT keeps a layer that is trained whole by its new values, this package by the change: one from the other.

``modules_to_save`` of any method's configuration, and LN-tuning, are kept so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.views import LayerView
from addenda.core.whole import WholeAdapter

__all__ = ["set_values", "values"]


def values(adapter: WholeAdapter, layer: Base) -> dict[str, Tensor]:
    """Return ``weight``, as the layer stores it, and ``bias`` with the change added, in the change's dtype."""
    matrix, bias = adapter.fold(layer.weight().to(adapter.weight), _wide(layer.bias(), adapter))
    found = {"weight": cast(LayerView, layer).from_matrix(matrix)}
    return found if bias is None else {**found, "bias": bias}


def set_values(adapter: WholeAdapter, layer: Base, given: Mapping[str, Tensor]) -> None:
    """Let the adapter change the layer to these values, in the shapes of `values`."""
    matrix = cast(LayerView, layer).to_matrix(given["weight"].to(adapter.weight))
    with torch.no_grad():
        adapter.matrix().copy_(matrix - layer.weight().to(adapter.weight))
        bias = _wide(layer.bias(), adapter)
        if adapter.bias is not None and bias is not None:
            adapter.bias.copy_(given["bias"].to(bias) - bias)


def _wide(bias: Tensor | None, adapter: WholeAdapter) -> Tensor | None:
    return None if bias is None else bias.to(adapter.weight)
