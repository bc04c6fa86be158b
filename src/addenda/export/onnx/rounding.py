"""Weights of a graph rounded on purpose: to half precision, or to whole numbers with a scale for each channel.

The operators are those that ONNX Runtime's own dynamic quantization makes, so that it fuses them as it does those;
they are made here so that each weight keeps its name and its layer, and no second copy of the model is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from addenda.export.onnx.graph import TRANSPOSED, own_name
from addenda.export.onnx.packages import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["SCALE", "to_half", "to_int8"]

SCALE = ".scale"
"""What is added to a weight's name for its scales, one for each output channel."""
_LEAST = 1024
"""Numbers in the smallest weight that is rounded."""
_LARGEST, _LARGEST_FACTOR = 127, 63
"""Largest whole number, and largest in a product: processors without instructions for the purpose add two products of
8 bits by 8 bits in 16, and would clip sums of larger ones without a word."""


def to_half(graph: ir.Graph, names: Sequence[str]) -> None:
    """Store matrices and kernels as float16; the graph computes with them in float32, as before."""
    ir_ = require("onnx_ir")
    for value in _large(graph, names):
        kept, uses = value.const_value, list(value.uses())
        stored = _initializer(graph, value.name, kept, np.float16, functools.partial(_half, kept))
        layer = own_name(value.name).rpartition(".")[0]
        wide = _node(graph, graph[0], "Cast", [stored], {"to": int(ir_.DataType.FLOAT)}, layer=layer)
        for node, index in uses:
            node.replace_input_with(index, wide)


def to_int8(graph: ir.Graph, names: Sequence[str], *, products: bool = True) -> None:
    """Store matrices and kernels as int8 with a scale for each output channel.

    Looked-up rows are scaled back as they are read, and the kernels of convolutions once, as the file is loaded.

    Args:
        graph: changed in place.
        names: of its weights.
        products: whether products of matrices are computed in whole numbers, their inputs rounded to 8 bits each time
            they run; else their weights are scaled back as the file is loaded.
    """
    rounder_of = functools.partial(_rounder, products=products)
    for value in _large(graph, names):
        uses = list(value.uses())
        if all(rounder_of(node, index) for node, index in uses):
            kinds = {node.op_type for node, _ in uses}
            largest = _LARGEST if kinds <= {"Conv", "Gather"} or not products else _LARGEST_FACTOR
            weight, scale = _whole(graph, value, largest, transposed="Gemm" in kinds and products)
            for node, index in uses:
                rounder = rounder_of(node, index)
                assert rounder is not None
                rounder(graph, node, weight, scale)


def _large(graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
    found = [graph.initializers[name] for name in names if name in graph.initializers]
    return [v for v in found if len(v.const_value.shape) > 1 and v.const_value.size >= _LEAST and v.uses()]


# ------------------------------------------------------------------------------------------------------ new weights


def _half(kept: ir.TensorProtocol) -> np.ndarray:
    return kept.numpy().astype(np.float16)


def _whole(graph: ir.Graph, value: ir.Value, most: int, *, transposed: bool) -> tuple[ir.Value, ir.Value]:
    """Replace a weight by whole numbers and scales; transposed if it is wanted so and is not yet."""
    kept, name = value.const_value, value.name
    assert kept is not None
    columns = name.endswith(TRANSPOSED)
    scales = _scales(kept.numpy(), most, columns=columns)
    turn = transposed and not columns
    made = _initializer(
        graph,
        name + TRANSPOSED if turn else name,
        kept,
        np.int8,
        functools.partial(_rounded, kept, scales, columns=columns, turn=turn),
        shape=kept.shape[::-1] if turn else None,
    )
    if turn:
        del graph.initializers[name]
    return made, _initializer(graph, f"{made.name}{SCALE}", scales, np.float32, lambda: scales)


def _scales(weight: np.ndarray, most: int, *, columns: bool) -> np.ndarray:
    largest = np.abs(weight).reshape(len(weight), -1).max(0 if columns else 1)
    return np.maximum(largest / most, np.finfo(np.float32).tiny).astype(np.float32)


def _rounded(kept: ir.TensorProtocol, scales: np.ndarray, *, columns: bool, turn: bool) -> np.ndarray:
    weight = kept.numpy()
    across = scales if columns else scales.reshape(-1, *(1,) * (weight.ndim - 1))
    found = np.rint(weight / across).astype(np.int8)
    return np.ascontiguousarray(found.T) if turn else found


def _initializer(
    graph: ir.Graph,
    name: str | None,
    like: Any,
    dtype: type,
    make: Callable[[], np.ndarray],
    *,
    shape: Any = None,
) -> ir.Value:
    """Register a weight that is computed when it is written."""
    ir_ = require("onnx_ir")
    kind, sizes = ir_.DataType.from_numpy(np.dtype(dtype)), ir_.Shape(like.shape if shape is None else shape)
    value = ir_.Value(name=name, type=ir_.TensorType(kind), shape=sizes)
    value.const_value = ir_.LazyTensor(lambda: ir_.tensor(make()), dtype=kind, shape=sizes, name=name)
    graph.initializers.pop(name, None)
    graph.register_initializer(value)
    return value


# -------------------------------------------------------------------------------------------------- their operators


def _rounder(node: ir.Node, index: int, *, products: bool) -> Callable[..., None] | None:
    """Return what rewrites a node for a weight of whole numbers as its input at ``index``; None where nothing does."""
    if not products and node.op_type != "Gather":
        return _scaled_back if node.op_type in {"Conv", "Gemm", "MatMul", "Transpose"} else None
    if node.op_type == "MatMul" and index == 1:
        return _product
    if node.op_type == "Gemm" and index == 1 and _plain(node):
        return _product
    if node.op_type == "Transpose" and all(
        user.op_type == "MatMul" and i == 1 for user, i in node.outputs[0].uses()
    ):
        return _tied
    if node.op_type == "Gather" and index == 0:
        return _lookup
    return _scaled_back if node.op_type == "Conv" and index == 1 else None


def _plain(node: ir.Node) -> bool:
    """Whether a Gemm is x W^T + b."""
    usual = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    return all(name in usual and each.value == usual[name] for name, each in node.attributes.items()) and (
        "transB" in node.attributes
    )


def _product(graph: ir.Graph, node: ir.Node, weight: ir.Value, scale: ir.Value) -> None:
    """Let x W be (round(x) W) scales."""
    x, *_ = node.inputs
    codes, step, zero = _nodes(graph, node, "DynamicQuantizeLinear", [x], outputs=3)
    whole = _node(graph, node, "MatMulInteger", [codes, weight, zero])
    real = _node(graph, node, "Cast", [whole], {"to": int(require("onnx_ir").DataType.FLOAT)})
    found = _node(graph, node, "Mul", [real, _node(graph, node, "Mul", [step, scale])])
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        found = _node(graph, node, "Add", [found, node.inputs[2]])
    _replace(graph, node, found)


def _tied(graph: ir.Graph, node: ir.Node, weight: ir.Value, scale: ir.Value) -> None:
    """The same where the weight is an embedding's too and has to be transposed as the graph runs."""
    turned = _node(graph, node, "Transpose", [weight], {"perm": [1, 0]})
    for user, _ in list(node.outputs[0].uses()):
        _product(graph, user, turned, scale)
    graph.remove(node, safe=True)


def _lookup(graph: ir.Graph, node: ir.Node, weight: ir.Value, scale: ir.Value) -> None:
    """Let W[ids] be W[ids] scales[ids]."""
    ids, ir_ = node.inputs[1], require("onnx_ir")
    rows = _node(
        graph, node, "Cast", [_node(graph, node, "Gather", [weight, ids])], {"to": int(ir_.DataType.FLOAT)}
    )
    last = _initializer(graph, f"{node.name}.last", np.zeros(1), np.int64, lambda: np.array([-1]))
    steps = _node(graph, node, "Unsqueeze", [_node(graph, node, "Gather", [scale, ids]), last])
    _replace(graph, node, _node(graph, node, "Mul", [rows, steps]))


def _scaled_back(graph: ir.Graph, node: ir.Node, weight: ir.Value, scale: ir.Value) -> None:
    """Let a weight be scaled back by operators that ONNX Runtime folds as it loads the file."""
    index = [
        value is weight or value.name == weight.name for value in node.inputs if value is not None
    ].index(True)
    real = _node(graph, node, "Cast", [weight], {"to": int(require("onnx_ir").DataType.FLOAT)})
    columns = (weight.name or "").endswith(TRANSPOSED)
    sizes = np.array([-1] if columns else [-1, *(1,) * (len(weight.shape) - 1)])
    shape = _initializer(graph, f"{node.name}.sizes", sizes, np.int64, lambda: sizes)
    steps = _node(graph, node, "Reshape", [scale, shape])
    node.replace_input_with(index, _node(graph, node, "Mul", [real, steps]))


def _node(
    graph: ir.Graph,
    before: ir.Node,
    kind: str,
    inputs: Sequence[Any],
    attributes: dict[str, Any] | None = None,
    *,
    layer: str | None = None,
) -> ir.Value:
    """Insert a node of one output into the layer of the one that it stands before."""
    return _nodes(graph, before, kind, inputs, attributes, layer=layer)[0]


def _nodes(
    graph: ir.Graph,
    before: ir.Node,
    kind: str,
    inputs: Sequence[Any],
    attributes: dict[str, Any] | None = None,
    *,
    outputs: int = 1,
    layer: str | None = None,
) -> list[ir.Value]:
    ir_ = require("onnx_ir")
    place, _, own = (before.name or "").rpartition("/")
    name = f"{place if layer is None else layer}/{own}.{kind}_{len(graph)}"
    made = ir_.node(kind, inputs=inputs, attributes=attributes or {}, num_outputs=outputs, name=name)
    for number, value in enumerate(made.outputs):
        value.name = f"{name}.{number}"
    graph.insert_before(before, made)
    return list(made.outputs)


def _replace(graph: ir.Graph, node: ir.Node, found: ir.Value) -> None:
    """Let another value take the place of a node's output, in name too where it is the graph's."""
    require("onnx_ir").convenience.replace_nodes_and_values(
        graph, node, [node], [], [node.outputs[0]], [found]
    )
