"""Adapters that ONNX Runtime switches over one session: the base's graph, and a file of values for each adapter.

In the graph the adapter's tensors are inputs that need not be given: by themselves they are zero, and the graph answers
as the base does. An ``.onnx_adapter`` file gives them values, for a call that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from addenda.bases.packed_layers import packed_layers
from addenda.core.handle import Handle
from addenda.errors import ExportError
from addenda.export.onnx.graph import TRANSPOSED, own_name
from addenda.export.onnx.packages import require
from addenda.export.onnx.reading import tensors_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "SUFFIX",
    "adapter_findings",
    "add_adapter",
    "make_switchable",
    "meant_by",
    "require_switchable",
    "write_adapter",
]

SUFFIX = ".onnx_adapter"
_OURS, _METHOD = "adapter.", "addenda.method"
"""What stands for ``adapters.<name>.`` in the graph, which serves adapters of any name; where their method is kept."""


def require_switchable(handle: Handle) -> None:
    """Refuse an adapter that zeros do not switch off, and one whose base is no plain graph.

    Raises:
        ExportError: it does more than add a term to the output of its layer, or the base's weights are packed.
    """
    if packed_layers(handle.model):
        raise ExportError(
            "the base's weights are packed, and an adapter that can be switched stands on dense ones",
            hint="load the base with weights='dense', or leave --type out to fold the adapter in",
        )
    other = [path for path, adapter in handle.adapters.items() if not adapter.additive]
    if other:
        raise ExportError(
            f"method '{handle.method.name}' does not just add to the output of '{other[0]}': it cannot be switched",
            hint="export one graph for each adapter: leave --type out",
        )


def make_switchable(model: ir.Model, handle: Handle) -> dict[str, Tensor]:
    """Make inputs of the adapter's tensors, zero where they are not given, and return their values by those names."""
    ir_, graph, values = require("onnx_ir"), model.graph, {}
    wanted = switched(handle)
    for name, value in list(graph.initializers.items()):
        if (own := own_name(name)) in wanted:
            ours = _in_graph(own, handle) + name[len(own) :]
            values[ours] = _turned(wanted[own], ours)
            value.name = ours
            value.const_value = ir_.tensor(np.zeros(value.const_value.shape, np.float32), name=ours)
            graph.inputs.append(value)
    model.metadata_props[_METHOD] = _told(handle)
    return values


def meant_by(handle: Handle) -> dict[str, Tensor]:
    """Return every tensor of the graph by its name there: the model's, and zeros for the adapter's."""
    own = switched(handle)
    rest = {name: tensor for name, tensor in tensors_of(handle.model).items() if name not in own}
    return rest | {_in_graph(name, handle): torch.zeros_like(tensor) for name, tensor in own.items()}


def switched(handle: Handle) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names that they have in the model."""
    inside = tuple(_place(path, f"adapters.{handle.name}.") for path in handle.paths)
    return {name: tensor for name, tensor in tensors_of(handle.model).items() if name.startswith(inside)}


def add_adapter(handle: Handle, folder: str | os.PathLike[str]) -> Path:
    """Write another adapter beside a graph that was exported as ``float32-adapter``.

    Args:
        handle: of the same method and settings as the one that the graph was exported with, on the same layers.
        folder: with the graph.

    Returns:
        The file, named by the adapter.

    Raises:
        ExportError: the graph has no place for it.
        MissingDependencyError: onnxruntime is not installed.
    """
    from addenda.export.runtimes.onnxruntime import Session

    session = Session(Path(folder) / "model.onnx")
    found, told = {_in_graph(n, handle): t for n, t in switched(handle).items()}, _told(handle)
    shapes = {name: shape for name, shape in session.overridable.items() if _is_ours(name)}
    problems = [] if session.metadata.get(_METHOD) == told else ["its method or its settings are others"]
    problems += [f"it has no '{own_name(name)}'" for name in shapes if own_name(name) not in found][:1]
    values = {name: _turned(found[own_name(name)], name) for name in shapes if own_name(name) in found}
    problems += [
        f"'{name}' has another shape" for name in values if tuple(values[name].shape) != shapes[name]
    ][:1]
    problems += [f"the graph has no '{name}'" for name in found if name not in map(own_name, shapes)][:1]
    if problems:
        raise ExportError(
            f"adapter '{handle.name}' does not fit the graph: {'; '.join(problems)}",
            hint="export it by itself, as a graph of its own",
        )
    path = Path(folder) / f"{handle.name}{SUFFIX}"
    write_adapter(values, path)
    return path


def write_adapter(values: Mapping[str, Tensor], path: Path) -> None:
    """Write values by the names of inputs as a file that ONNX Runtime maps into memory."""
    runtime = require("onnxruntime")
    made = runtime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    held = {name: runtime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in values.items()}
    made.set_parameters(held)
    made.export_adapter(os.fspath(path))


def adapter_findings(path: Path, handle: Handle) -> list[str]:
    """Return what an adapter's file holds other than meant, each tensor named."""
    meant = {_in_graph(name, handle): tensor for name, tensor in switched(handle).items()}
    runtime = require("onnxruntime")
    try:
        held = runtime.AdapterFormat.read_adapter(os.fspath(path)).get_parameters()
        found = {name: torch.from_numpy(value.numpy().copy()) for name, value in held.items()}
    except Exception as problem:  # noqa: BLE001  (of classes of the runtime's own)
        return [f"'{path.name}' cannot be read: {str(problem).splitlines()[0]}"]
    told = {tensor.data_ptr() for name, tensor in meant.items() if name in map(own_name, found)}
    problems = [f"'{path.name}' has no '{name}'" for name, t in meant.items() if t.data_ptr() not in told]
    for name, tensor in found.items():
        if (own := own_name(name)) not in meant or not torch.equal(tensor, _turned(meant[own], name)):
            problems.append(f"'{path.name}' holds other values than the trained '{own}'")
    return problems


def _told(handle: Handle) -> str:
    return json.dumps({"name": handle.method.name, **handle.method.settings()}, sort_keys=True)


def _place(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path else inner


def _in_graph(name: str, handle: Handle) -> str:
    return name.replace(f"adapters.{handle.name}.", _OURS, 1)


def _is_ours(name: str) -> bool:
    return name.startswith(_OURS) or f".{_OURS}" in name


def _turned(tensor: Tensor, name: str) -> Tensor:
    return (tensor.T if name.endswith(TRANSPOSED) else tensor).detach().cpu().contiguous()
