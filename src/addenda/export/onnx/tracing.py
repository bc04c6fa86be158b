"""A model's forward, traced by PyTorch's exporter into an ONNX graph that takes other batches and lengths too."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from addenda.core.layers.experts import ExpertPart
from addenda.errors import ExportError
from addenda.export.onnx.packages import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "dynamic_dims", "trace"]

OPSET = 20
"""Version of the operator set; the first with a Gelu of its own."""


def dynamic_dims(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[int, str]]:
    """Return which dimensions of each input may have any size, with their names in the graph.

    They are the first one, the batch; the length of ids and masks, whole numbers (batch, length); and those in
    which the rows differ. All others keep the size that they have in the rows.

    Args:
        rows: arguments of one forward each, of the same names.

    Example:
        >>> ids, image = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 3, 8, 8)
        >>> dynamic_dims([{"ids": ids, "image": image}])
        {'ids': {0: 'batch', 1: 'length'}, 'image': {0: 'batch'}}
    """
    found: dict[str, dict[int, str]] = {}
    for name, first in rows[0].items():
        dims = {0: "batch"}
        for dim in range(1, first.dim()):
            if first.dim() == 2 and not first.is_floating_point():
                dims[dim] = "length"
            elif len({row[name].shape[dim] for row in rows}) > 1:
                dims[dim] = f"{name}_{dim}"
        found[name] = dims
    return found


def trace(
    module: nn.Module,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
) -> ir.Model:
    """Trace ``module(*example.values())`` without gradients.

    Args:
        module: in evaluation mode; takes the values in the order of ``example`` and returns a tensor, or a tuple of
            them, for each of ``outputs``.
        example: an input by its name; dynamic dimensions must be 2 or more, since 1 would be taken for a constant.
        dims: as of `dynamic_dims`.
        outputs: names of what it returns.

    Raises:
        ExportError: PyTorch cannot trace it, or not for any batch and length.
        MissingDependencyError: the packages of the extra ``onnx`` are not installed.
    """
    require("onnx_ir", "onnxscript")
    shapes = tuple(dict.fromkeys(dims[name], torch.export.Dim.DYNAMIC) for name in example)
    try:
        with torch.no_grad(), _quiet(), _experts_in_batches(module):
            program = torch.export.export(
                module, tuple(example.values()), dynamic_shapes=(shapes,), strict=False
            )
            made = torch.onnx.export(
                program,
                input_names=list(example),
                output_names=list(outputs),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except Exception as problem:  # the exporter raises whatever the model's code does
        raise ExportError(
            f"PyTorch cannot trace {type(module).__name__}",
            where={"because": _reason(problem)},
            hint="its forward must not branch on the values or sizes of its inputs",
        ) from problem
    assert made is not None
    return made.model


@contextlib.contextmanager
def _experts_in_batches(module: nn.Module) -> Iterator[None]:
    """Let transformers multiply by gathered weights of experts; its own choice is an operation that ONNX lacks."""
    configs = [
        each.config
        for each in cast("Iterator[Any]", module.modules())
        if ExpertPart.held_by(each) and hasattr(getattr(each, "config", None), "_experts_implementation")
    ]
    before = [config._experts_implementation for config in configs]
    try:
        for config in configs:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation


def _reason(problem: BaseException) -> str:
    """Return what began a chain of exceptions, in a line: those on top tell how to report it to PyTorch."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on PyTorch's own code and on packages that it could also serve to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
