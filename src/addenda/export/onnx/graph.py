"""The exporter's graph made ready to be written: parameters under their PyTorch names, nodes under their layers'.

Nothing is fused and no parameter is folded into another: ONNX Runtime does that when it loads the file, for the
machine it is on, and a file in which each weight has its name can be read back layer by layer.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from addenda.errors import ExportError
from addenda.export.onnx.packages import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["TRANSPOSED", "own_name", "tidy"]

TRANSPOSED = ".T"
"""What is added to the name of a matrix that is kept transposed, ready for a product from the right."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def own_name(name: str | None) -> str:
    """Return the PyTorch name of a parameter in a graph."""
    return (name or "").removesuffix(TRANSPOSED)


def tidy(model: ir.Model, *, prefix: str, dims: Mapping[str, Mapping[int, str]]) -> None:
    """Give parameters, nodes and dimensions their names, fold what is constant, and drop what nobody asks for.

    Args:
        model: as `trace` gives it; changed in place.
        prefix: what the traced module added to the names of the parameters, with its dot.
        dims: the names of the inputs' dimensions, as of `dynamic_dims`.
    """
    passes = require("onnx_ir.passes.common")
    passes.InlinePass()(model)
    _transpose(model)
    parameters = [name for name in model.graph.initializers if name.startswith(prefix)]
    _fold(model, parameters)
    for each in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
    ):
        each(model)
    for name in parameters:
        if name in model.graph.initializers:
            model.graph.initializers[name].name = name.removeprefix(prefix)
    _name_nodes(model, prefix)
    _name_dims(model, dims)
    model.producer_name, model.producer_version = "addenda", None


def _fold(model: ir.Model, parameters: list[str]) -> None:
    """Fold what is constant, save what is computed from a parameter: that would hide its name."""
    optimizer, kept = require("onnxscript.optimizer"), set(parameters)

    def free(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in kept for value in node.inputs) else None

    optimizer.fold_constants_ir(model, should_fold=free)


def _transpose(model: ir.Model) -> None:
    """Keep each matrix that is used transposed alone in that form."""
    ir_ = require("onnx_ir")
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        uses = [node for node, _ in value.uses()]
        if not uses or any(not _swaps(node) for node in uses):
            continue
        kept = value.const_value
        shape = ir_.Shape(kept.shape[::-1])
        made = ir_.Value(name=f"{name}{TRANSPOSED}", type=value.type, shape=shape)
        made.const_value = ir_.LazyTensor(
            functools.partial(_turned, kept), dtype=kept.dtype, shape=shape, name=made.name
        )
        graph.register_initializer(made)
        for node in uses:
            node.outputs[0].replace_all_uses_with(made)
            graph.remove(node, safe=True)
        del graph.initializers[name]


def _turned(kept: ir.TensorProtocol) -> ir.TensorProtocol:
    found: ir.TensorProtocol = require("onnx_ir").tensor(np.ascontiguousarray(kept.numpy().T))
    return found


def _swaps(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and list(perm.as_ints()) == [1, 0]


def _name_nodes(model: ir.Model, prefix: str) -> None:
    """Name each node by its layer and what it does there; drop traces of the source code, which tell paths."""
    for number, node in enumerate(model.graph):
        scopes = node.metadata_props.get(_SCOPES, "[]")
        node.name = f"{_layer_of(scopes, prefix)}/{node.op_type}_{number}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _layer_of(scopes: str, prefix: str) -> str:
    """Return the path of the module that the exporter says a node comes from."""
    names = [name for name in ast.literal_eval(scopes)[:-1] if isinstance(name, str)]
    return names[-1].removeprefix(prefix) if names and names[-1].startswith(prefix) else ""


def _name_dims(model: ir.Model, dims: Mapping[str, Mapping[int, str]]) -> None:
    """Give the sizes that may vary the names they have for the user, in inputs and outputs."""
    ir_ = require("onnx_ir")
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, name in dims[value.name].items():
            symbol = value.shape[dim]
            if isinstance(symbol, int):
                raise ExportError(
                    f"the model takes '{value.name}' in no other size than {symbol} along dimension {dim}",
                    hint="its forward must not depend on the size of the batch or the length",
                )
            names.setdefault(symbol.value, name)
            value.shape[dim] = ir_.SymbolicDim(name)
    for node in model.graph:
        for value in node.outputs:
            if value.is_graph_output() and value.shape is not None:
                for dim, symbol in enumerate(value.shape):
                    if not isinstance(symbol, int):
                        spelled = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), symbol.value)
                        value.shape[dim] = ir_.SymbolicDim(spelled)
            else:
                value.shape = None
