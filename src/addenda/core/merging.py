"""What a merge reads and writes of a layer: its weight and bias with an adapter folded in, and who else has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter
from addenda.core.host import fold
from addenda.core.views import LayerView

__all__ = ["copy_of", "fold_into", "tied", "write"]


def tied(model: nn.Module, views: Mapping[str, LayerView]) -> dict[str, str]:
    """Return, for each layer whose weight or bias is also another module's, that other module's path."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, module))
    found = {}
    for path, view in views.items():
        places = [place for place in (view.weight_place(), view.bias_place()) if place is not None]
        others = [
            other
            for place in places
            for other, module in owners.get(id(place.parameter), ())
            if module is not place.module
        ]
        if others:
            found[path] = others[0]
    return found


def fold_into(adapter: Adapter, view: LayerView) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight, as the layer stores it, and bias with an adapter folded in; nothing is written."""
    with torch.no_grad():
        weight, bias = fold(view, [adapter.fold])
    return view.from_matrix(weight), bias


def copy_of(view: LayerView) -> tuple[Tensor, Tensor | None]:
    """Return copies of a layer's weight, as it stores it, and bias."""
    bias = view.bias()
    return view.weight_place().tensor().detach().clone(), None if bias is None else bias.clone()


def write(view: LayerView, weight: Tensor, bias: Tensor | None) -> None:
    """Write a layer's weight and bias; the one place where a base weight is changed."""
    with torch.no_grad():
        view.weight_place().tensor().copy_(weight)
        place = view.bias_place()
        if place is None:
            return
        if bias is None:
            if place.parameter is not None:
                place.module._parameters[place.name] = None
        elif place.parameter is None:
            place.module._parameters[place.name] = nn.Parameter(bias.clone(), requires_grad=False)
        else:
            place.tensor().copy_(bias)
