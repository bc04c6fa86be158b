"""A model's forward as a program of ExecuTorch, for any batch and length up to a bound."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.errors import ExportError
from addenda.export.onnx.tracing import dynamic_dims
from addenda.export.packages import require
from addenda.export.probes import Row
from addenda.export.traceable import Positional, require_finite

__all__ = [
    "BATCH",
    "LENGTH",
    "bounds_of",
    "refusing",
    "require_executorch",
    "rounded_program",
    "save",
    "write_program",
]

BATCH, LENGTH = 8, 256
"""Up to which memory is set aside, where the model and the rows do not ask for other."""
_WHAT = "ExecuTorch programs"


def require_executorch(*names: str) -> Any:
    """Import modules of ExecuTorch and return the first.

    Raises:
        MissingDependencyError: it is not installed.
    """
    with _quiet():
        return require("executorch", _WHAT, *(f"executorch.{name}" for name in names))


def bounds_of(
    rows: Sequence[Row], *, batch: int = BATCH, length: int = LENGTH
) -> dict[str, dict[int, tuple[str, int]]]:
    """Return which dimensions of each input may have another size, with a name and the largest one.

    ExecuTorch sets memory aside for the largest, so that none is without bound.

    Args:
        rows: arguments of one forward each, of the same names.
        batch: bound of the first dimension; 1 keeps it at one.
        length: bound of the length of ids and masks, unless a row is longer.

    Example:
        >>> bounds_of([{"ids": torch.zeros(2, 7, dtype=torch.long)}])
        {'ids': {0: ('batch', 8), 1: ('length', 256)}}
    """
    found: dict[str, dict[int, tuple[str, int]]] = {}
    for input_name, dims in dynamic_dims(rows).items():
        found[input_name] = {}
        for dim, name in dims.items():
            largest = max(row[input_name].shape[dim] for row in rows)
            bound = max(largest, {"batch": batch, "length": length}.get(name, 1))
            if bound > 1:
                found[input_name][dim] = (name, bound)
    return found


def write_program(
    model: nn.Module,
    rows: Sequence[Row],
    bounds: Mapping[str, Mapping[int, tuple[str, int]]],
    path: Path,
    *,
    int8: bool,
    seen: Sequence[Row] = (),
) -> None:
    """Trace a model as it is now, adapters that are not merged included, and write its program.

    Args:
        model: in evaluation mode, in float32.
        rows: arguments of one forward each; the inputs of the program are theirs, in the first row's order.
        bounds: as of `bounds_of`.
        path: the file.
        int8: round weights to 8 bits, a scale a channel. Activations are rounded as they come where the inputs are
            whole numbers, and by the ranges that are seen where they are not.
        seen: rows that show these ranges; the others where there are none.

    Raises:
        ExportError: PyTorch or ExecuTorch cannot trace it, or a weight is not finite.
        MissingDependencyError: ExecuTorch is not installed.
    """
    require_finite(model)
    names = list(rows[0])
    example, shapes = _example(rows, bounds), _shapes(names, bounds)
    with refusing(model), _without_cache(model):
        # Its inputs are gathered in one argument, for which the sizes are told as one too.
        program = torch.export.export(
            Positional(model, names), example, dynamic_shapes=(shapes,), strict=False
        )
        if int8:
            rounded = rounded_program(program, [[row[name] for name in names] for row in seen or rows])
            program = torch.export.export(rounded, example, dynamic_shapes=shapes, strict=False)
        save(program, path)


@contextlib.contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Trace without gradients and without remarks, and say of what fails that ExecuTorch cannot hold the model."""
    require_executorch("exir", "backends.xnnpack.partition.xnnpack_partitioner")
    try:
        with torch.no_grad(), _quiet():
            yield
    except Exception as problem:  # both raise whatever the model's code does
        raise ExportError(
            f"ExecuTorch cannot hold {type(model).__name__}",
            where={"because": _reason(problem)},
            hint="its forward must not branch on the values or sizes of its inputs",
        ) from problem


def save(
    program: torch.export.ExportedProgram,
    path: Path,
    constants: Mapping[str, Any] | None = None,
    *,
    singly: bool = False,
) -> None:
    """Lower what was traced, to XNNPACK where that has the operators, and write it.

    Args:
        program: as traced.
        path: the file.
        constants: what methods without arguments give back, by their names.
        singly: hand each product of rounded activations to XNNPACK by itself. Larger parts of a decoder would need
            what is computed between them.
    """
    exir = require_executorch("exir")
    xnnpack = require_executorch("backends.xnnpack.partition.xnnpack_partitioner")
    parts = [xnnpack.XnnpackDynamicallyQuantizedPartitioner(per_op_mode=True)] if singly else []
    lowered = exir.to_edge_transform_and_lower(
        program, partitioner=[*parts, xnnpack.XnnpackPartitioner()], constant_methods=dict(constants or {})
    )
    # A cache is written in place: it would be copied whole for each token.
    made = lowered.to_executorch(exir.ExecutorchBackendConfig(run_reinplace_pass=True))
    with path.open("wb") as file:
        made.write_to_file(file)


def _example(rows: Sequence[Row], bounds: Mapping[str, Mapping[int, tuple[str, int]]]) -> tuple[Tensor, ...]:
    """The longest row, doubled along dimensions of size 1 that may be larger: 1 would be taken for a constant."""
    longest = max(rows, key=lambda row: sum(value.numel() for value in row.values()))
    made = []
    for name in rows[0]:
        value = longest[name].detach()
        for dim in bounds[name]:
            if value.shape[dim] == 1:
                value = torch.cat([value, value], dim)
        made.append(value)
    return tuple(made)


def _shapes(names: Sequence[str], bounds: Mapping[str, Mapping[int, tuple[str, int]]]) -> tuple[Any, ...]:
    dims: dict[str, Any] = {}
    for each in bounds.values():
        for name, bound in each.values():
            dims.setdefault(name, torch.export.Dim(name, min=1, max=bound))
    return tuple({dim: dims[name] for dim, (name, _) in bounds[each].items()} for each in names)


def rounded_program(program: torch.export.ExportedProgram, rows: Sequence[Sequence[Tensor]]) -> nn.Module:
    """Return what was traced with weights of 8 bits; see `write_program`.

    Args:
        program: as traced.
        rows: its arguments, one call each, by which ranges are found.
    """
    quantizer = require_executorch("backends.xnnpack.quantizer.xnnpack_quantizer")
    pt2e = require("executorch", _WHAT, "torchao.quantization.pt2e.quantize_pt2e")
    dynamic = not any(value.is_floating_point() for value in rows[0])
    numbers = quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    chosen = quantizer.XNNPACKQuantizer()
    if dynamic:
        chosen.set_operator_type(torch.ops.aten.linear.default, numbers)
        # It would turn every number in the graph into a float tensor, those that are added to indices too.
        chosen.transform_for_annotation = lambda graph: graph
    else:
        chosen.set_global(numbers)
        annotate = chosen.annotate
        chosen.annotate = lambda graph: _rounded_once_clamped(annotate(graph))
    prepared = pt2e.prepare_pt2e(program.module(), chosen)
    for row in rows:
        prepared(*row)
    made: nn.Module = pt2e.convert_pt2e(prepared)
    return made


def _rounded_once_clamped(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Move the rounding of an output that is clamped at once, as by ReLU6, behind the clamp.

    XNNPACK computes both in one, but the quantizer knows of ReLU only: 8 bits would be spread over all that comes
    out of a convolution, where a narrow part of it is left.
    """
    aten = torch.ops.aten
    for node in graph.graph.nodes:
        if node.target not in (aten.hardtanh.default, aten.hardtanh_.default):
            continue
        before = node.args[0]
        told = before.meta.get("quantization_annotation")
        fusible = before.target in (aten.conv2d.default, aten.linear.default) and len(before.users) == 1
        if fusible and told is not None and told.output_qspec is not None:
            clamped = node.meta["quantization_annotation"]
            clamped.input_qspec_map, clamped.output_qspec = {}, told.output_qspec
            told.output_qspec = None
    return graph


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A decoder that is asked for whole sequences fills no cache."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep remarks on PyTorch's and ExecuTorch's own code to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(problem: BaseException) -> str:
    while problem.__cause__ is not None:
        problem = problem.__cause__
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:300]
