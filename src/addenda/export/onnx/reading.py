"""A written file read back: whether each layer holds its own weight, and each weight is used in its own layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from addenda.export.onnx.graph import TRANSPOSED, own_name
from addenda.export.onnx.packages import require
from addenda.export.onnx.rounding import SCALE

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["findings", "tensors_of"]

_CARRIERS = {"Cast", "Identity", "Transpose"}
"""Operators that hand a weight on as what it is."""


def findings(path: Path, meant: Mapping[str, Tensor]) -> list[str]:
    """Return what a file holds other than meant, each layer named; nothing where all is right.

    Args:
        path: the file.
        meant: every tensor of the model as it was traced, under all names that it has; see `tensors_of`.
    """
    try:
        graph = require("onnx_ir").load(path).graph
        return [*_other_values(graph, meant), *_other_places(graph, meant)]
    except Exception as problem:  # noqa: BLE001  (a damaged file fails in whichever library comes upon it)
        return [
            f"'{path.name}' cannot be read: {(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
        ]


def _other_values(graph: ir.Graph, meant: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in graph.initializers.items():
        own = own_name(name)
        if own not in meant:
            continue
        wanted = meant[own].T if name != own else meant[own]
        if value.const_value is None or tuple(value.const_value.shape) != tuple(wanted.shape):
            yield f"'{own}' has another shape"
        elif not _holds(graph, name, wanted):
            yield f"'{own}' holds other values than the trained model"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all names that they have."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for each in named for name, tensor in each}


def _holds(graph: ir.Graph, name: str, wanted: Tensor) -> bool:
    """Whether an initializer is a tensor, rounded as its number format has to be and no more."""
    found = _read(graph, name)
    if found.dtype == torch.int8:
        scale = _read(graph, f"{name}{SCALE}")
        if not name.endswith(TRANSPOSED):
            scale = scale.reshape(-1, *(1,) * (found.dim() - 1))
        return bool(((found * scale - wanted.cpu()).abs() <= 0.501 * scale + 1e-12).all())
    return torch.equal(found, wanted.cpu().to(found.dtype))


def _read(graph: ir.Graph, name: str) -> Tensor:
    kept = graph.initializers[name].const_value
    assert kept is not None
    return torch.from_numpy(kept.numpy().copy())


def _other_places(graph: ir.Graph, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    owners: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        owners.setdefault(tensor.data_ptr(), set()).add(_layer(name.rpartition(".")[0]))
    for node in graph:
        if node.op_type in _CARRIERS:
            continue
        layer = _layer((node.name or "").rpartition("/")[0])
        for value in node.inputs:
            own = own_name(_source(value))
            if own in tensors and not any(
                _within(layer, owner) or _within(owner, layer) for owner in owners[tensors[own].data_ptr()]
            ):
                yield f"'{layer}' computes with '{own}'"


def _source(value: ir.Value | None) -> str:
    """Return the name of the initializer that a value is, as it is or in another form; empty where it is none."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _CARRIERS and not _scales_back(node):
            return ""
        value = node.inputs[0]
    return value.name or "" if value is not None and value.is_initializer() else ""


def _scales_back(node: ir.Node) -> bool:
    """Whether a node multiplies whole numbers by their scales."""
    first = node.inputs[0]
    before = None if first is None else first.producer()
    return node.op_type == "Mul" and before is not None and before.op_type == "Cast"


def _layer(path: str) -> str:
    """Return the path of the layer that an adapter's module stands on; other paths as they are."""
    return path.partition(".adapter")[0]


def _within(path: str, outer: str) -> bool:
    return path == outer or not outer or path.startswith(f"{outer}.")
