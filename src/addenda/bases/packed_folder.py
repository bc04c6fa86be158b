"""A model folder whose weights are packed: one safetensors file of raw rows, with their formats in its header.

The file is mapped, not read: a page of weights takes memory when it is first used, and may give it back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from addenda.bases import formats
from addenda.bases.directory import PACKED
from addenda.bases.empty import empty_model
from addenda.bases.packed_layers import PackedEmbedding, PackedLinear
from addenda.errors import BaseModelError
from addenda.kernels.library import enable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["load_packed", "write_packed"]

_HEADER = "weight_formats"
_AGAIN = "delete the folder; it is made again at the next load"


def write_packed(folder: Path, tensors: Mapping[str, Tensor], packed: Mapping[str, str]) -> None:
    """Write a model's tensors by name; those in ``packed`` are raw rows in the format it names."""
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / PACKED, metadata={_HEADER: json.dumps(dict(packed))})


def load_packed(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal model whose packed weights stay in the folder's file.

    Args:
        folder: a packed model folder.
        config: its config.
        dtype: to compute in, and of the weights that are not packed.

    Raises:
        BaseModelError: the file does not fit the config, or a layer does more than its weight tells.
    """
    from transformers import AutoModelForCausalLM

    enable()  # without a compiler the plain forms unpack, five to twenty times slower
    tensors, packed = _read(folder)
    model = empty_model(AutoModelForCausalLM, config, dtype)
    try:
        for name, kind in packed.items():
            for path, module in _owners(model, name):
                model.set_submodule(path, _packed_form(path, module, tensors[name], kind, dtype))
        rest = {name: tensor.to(dtype) for name, tensor in tensors.items() if name not in packed}
        found = model.load_state_dict(rest, strict=False, assign=True)
    except (AttributeError, RuntimeError) as error:
        raise _misfit(folder, str(error)) from error
    empty = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if p.is_meta]
    if empty or found.unexpected_keys:
        raise _misfit(folder, f"missing {empty[:3]}, extra {list(found.unexpected_keys)[:3]}")
    return model


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / PACKED, framework="pt") as file:
            packed: dict[str, str] = json.loads(file.metadata()[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise BaseModelError(
            f"'{PACKED}' is not a whole file of packed weights: {error}",
            where={"folder": folder},
            hint=_AGAIN,
        ) from error
    return tensors, packed


def _owners(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that has this weight: the one it is named after, and those tied to it."""
    weight = model.get_parameter(name)
    yield from [
        (path, module)
        for path, module in model.named_modules()
        if vars(module)["_parameters"].get("weight") is weight
    ]


def _packed_form(path: str, module: nn.Module, raw: Tensor, kind: str, dtype: torch.dtype) -> nn.Module:
    entry = formats.get(kind)
    weight = module.get_parameter("weight")
    if raw.shape != (len(weight), entry.row_bytes(weight.shape[1])):
        raise RuntimeError(f"'{path}' has {tuple(weight.shape)} weights, its raw rows are {tuple(raw.shape)}")
    width = weight.shape[1]
    if type(module).forward is nn.Linear.forward:
        return PackedLinear(raw, entry, width, module._parameters.get("bias"), dtype)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(raw, entry, width, _scale_of(path, module), dtype)
    raise _does_more(path, module)


def _scale_of(path: str, module: nn.Embedding) -> float | None:
    """The factor on what an embedding looks up, proven on a small table; None for a plain one."""
    if type(module).forward is nn.Embedding.forward and module.max_norm is None:
        return None
    scale = float(getattr(module, "embed_scale", 1.0))
    small = copy.copy(module)
    table = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    vars(small)["_parameters"] = {"weight": nn.Parameter(table)}
    small.padding_idx, ids = None, torch.arange(4)
    if not torch.equal(small(ids), functional.embedding(ids, table) * scale):
        raise _does_more(path, module)
    return scale


def _does_more(path: str, module: nn.Module) -> BaseModelError:
    return BaseModelError(
        f"'{path}' ({type(module).__name__}) does more than apply its weight, and so cannot keep it packed",
        hint="keep the weights dense: --set base.weights=dense",
    )


def _misfit(folder: Path, problem: str) -> BaseModelError:
    return BaseModelError(
        f"the packed weights do not fit 'config.json': {problem}", where={"folder": folder}, hint=_AGAIN
    )
