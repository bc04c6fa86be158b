"""A model written as ``model.onnx``; weights that are too many for one file lie in ``model.onnx.data`` beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from addenda.bases.stepwise import CachedDecoder, cache_shapes
from addenda.export.onnx.graph import tidy
from addenda.export.onnx.packages import require
from addenda.export.onnx.tracing import dynamic_dims, trace
from addenda.export.probes import named_output
from addenda.export.traceable import Positional, require_finite

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DATA", "FILE", "PAST", "PRESENT", "decoder_graph", "graph_of", "save"]

FILE, DATA = "model.onnx", "model.onnx.data"
_ONE_FILE = 1 << 30
"""Up to so many bytes of weights the graph's own file holds them; the format ends at twice as many."""
_PREFIX = "model."
PAST, PRESENT = "past_key_values", "present"
"""What the names of the cache's tensors begin with, as inputs and as outputs; ``.0.key`` and so on follow."""


def graph_of(model: nn.Module, rows: Sequence[Mapping[str, Tensor]]) -> ir.Model:
    """Trace a model as it is now, adapters that are not merged included; its values are read when they are saved.

    Args:
        model: in evaluation mode, in float32.
        rows: arguments of one forward each, batch first; the graph takes any batch, any length of ids, and other
            sizes where these rows differ.

    Raises:
        ExportError: it cannot be traced, or a weight is not finite.
        MissingDependencyError: the packages of the extra ``onnx`` are not installed.
    """
    require_finite(model)
    dims = dynamic_dims(rows)
    longest = max(rows, key=lambda row: sum(value.numel() for value in row.values()))
    example = {name: _several(value, dims[name]) for name, value in longest.items()}
    with torch.no_grad():
        output, _ = named_output(model(**example))
    made = trace(Positional(model, list(example)), example, dims, [output])
    tidy(made, prefix=_PREFIX, dims=dims)
    return made


def decoder_graph(model: nn.Module) -> ir.Model:
    """Trace a causal language model with its key-value cache, adapters that are not merged included.

    Inputs are ``input_ids`` (batch, length), ``attention_mask`` (batch, past + length), ``position_ids`` (batch,
    length) where the model takes such, and ``past_key_values.<layer>.key`` and ``.value`` (batch, heads, past,
    features); ``past`` is 0 at first. Outputs are ``logits`` and ``present.<layer>.key`` and ``.value``, to be given
    as the next call's past.

    Args:
        model: in evaluation mode, in float32.

    Raises:
        BaseModelError: it keeps no key-value cache.
        ExportError: it cannot be traced, or a weight is not finite.
        MissingDependencyError: the packages of the extra ``onnx`` are not installed.
    """
    require_finite(model)
    batch, length, past = 2, 3, 4
    module, device = CachedDecoder(model), next(model.parameters()).device
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    example = {"input_ids": ids, "attention_mask": ids.new_ones(batch, past + length)}
    dims = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "past + length"}}
    if module.takes_positions:
        example["position_ids"] = torch.arange(past, past + length, device=device).repeat(batch, 1)
        dims["position_ids"] = dims["input_ids"]
    cached = {}
    for layer, shapes in enumerate(cache_shapes(model)):
        for part, (heads, features) in zip(("key", "value"), shapes, strict=True):
            cached[f"{PAST}.{layer}.{part}"] = torch.zeros(batch, heads, past, features, device=device)
    dims |= {name: {0: "batch", 2: "past"} for name in cached}
    outputs = ["logits", *(name.replace(PAST, PRESENT) for name in cached)]
    made = trace(module, {**example, **cached}, dims, outputs)
    tidy(made, prefix=_PREFIX, dims=dims)
    return made


def _several(value: Tensor, dims: Mapping[int, str]) -> Tensor:
    """Repeat a tensor where it has size 1 along a dimension that is to take any size: 1 counts as a constant."""
    for dim in dims:
        if value.shape[dim] == 1:
            value = torch.cat([value, value], dim)
    return value


def save(graph: ir.Model, folder: Path) -> None:
    """Write the graph and its weights into an existing folder, one weight after another."""
    total = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    require("onnx_ir").save(graph, folder / FILE, external_data=DATA if total > _ONE_FILE else None)
