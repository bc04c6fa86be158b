"""Take a GGUF file's tensors over as they are packed, under the names and in the row order that transformers uses.

Runs in the converter's child process (`gguf_convert`). A tensor at a time is unpacked to prove that its raw rows, in
their new order, hold what transformers would make of it; the dense model never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.bases.gguf_header import GGUFHeader

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

__all__ = ["DENSE_TYPES", "Process", "packing_problem", "read_packed", "transformers_ways"]

DENSE_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF's formats that are no packing, and their dtypes."""

Process = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any] | None"]


def packing_problem(header: GGUFHeader) -> str:
    """Return why a file's tensors cannot stay packed, naming the first that cannot, or ""."""
    from addenda.bases import formats

    for tensor in header.tensors:
        if tensor.type in DENSE_TYPES:
            continue
        if formats.find(tensor.type) is None:
            return f"tensor '{tensor.name}' is in format {tensor.type}, which cannot be trained on as it is"
        if len(tensor.shape) != 2:
            return f"tensor '{tensor.name}' stacks {tensor.shape[0]} matrices, as experts do"
    return ""


def read_packed(path: Path, header: GGUFHeader, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor of a file for a model on the meta device.

    Returns:
        The tensors by the model's names, raw rows as uint8; and the formats of those that are packed.

    Raises:
        ValueError: a packed tensor is no plain linear or embedding weight, or is more than reordered on the way.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(str(path))["config"]
    name_of, process_of = transformers_ways(header.architecture, model, config)
    tensors: dict[str, Tensor] = {}
    packed: dict[str, str] = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        name = name_of.get(tensor.name)
        if name is None:
            continue
        process, kind = process_of(tensor.name), tensor.tensor_type.name
        values = process(gguf.dequantize(tensor.data, tensor.tensor_type))
        if kind in DENSE_TYPES:
            tensors[name] = _dense(values, kind, tensor.name)
        else:
            _require_plain(model, name, tensor.name)
            tensors[name] = _reordered(tensor.data, kind, values, process, tensor.name)
            packed[name] = kind
    return tensors, packed


def transformers_ways(
    architecture: str, model: nn.Module, config: Mapping[str, Any]
) -> tuple[dict[str, str], Callable[[str], Process]]:
    """Return the model's name of each of the file's tensors, and what transformers does to a tensor's values."""
    from transformers import modeling_gguf_pytorch_utils as ways

    processor = ways.TENSOR_PROCESSORS.get(architecture, ways.TensorProcessor)(config=dict(config))
    names: dict[str, str] = ways.get_gguf_hf_weights_map(model, processor)

    def process_of(name: str) -> Process:
        def process(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
            stacked: dict[str, Tensor] = {}
            made = processor.process(
                weights=values, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": stacked}
            )
            if made.name == name:
                values_there: np.ndarray[Any, Any] = made.weights
                return values_there
            return next(iter(stacked.values())).numpy() if len(stacked) == 1 else None

        return process

    return names, process_of


def _dense(values: np.ndarray[Any, Any] | None, kind: str, name: str) -> Tensor:
    """The values in the file's own dtype where that holds them, else in float32."""
    import torch

    if values is None:
        raise ValueError(f"tensor '{name}' is split or stacked on the way to the model")
    wide = torch.from_numpy(values.copy())
    own = wide.to(getattr(torch, DENSE_TYPES[kind]))
    return own if torch.equal(own.to(wide.dtype), wide) else wide


def _require_plain(model: nn.Module, name: str, tensor: str) -> None:
    from torch import nn

    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last != "weight" or not isinstance(module, nn.Linear | nn.Embedding):
        raise ValueError(
            f"tensor '{tensor}' belongs to a {type(module).__name__}, which cannot keep its weight packed"
        )


def _reordered(
    data: np.ndarray[Any, Any], kind: str, values: np.ndarray[Any, Any] | None, process: Process, name: str
) -> Tensor:
    """The raw rows in the order in which transformers has them, proven by their numbers."""
    import numpy as np
    import torch

    from addenda.bases import formats

    raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8)).clone()
    order = process(np.arange(len(raw), dtype=np.float64)[:, None])
    if values is not None and order is not None and order.shape == (len(raw), 1):
        raw = raw[torch.from_numpy(order[:, 0].copy()).long()]
        made = formats.get(kind).dequantize(raw, values.shape[1])
        if torch.equal(made, torch.from_numpy(np.ascontiguousarray(values))):
            return raw
    raise ValueError(f"tensor '{name}' is more than reordered by rows on the way to the model")
