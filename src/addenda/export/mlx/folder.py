"""Writing mlx-lm's adapter folder, and comparing one with what it was written from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from addenda.core.handle import Handle
from addenda.core.layers import LayerKind, kind_of, layer_at
from addenda.core.views import PartView
from addenda.errors import ExportError
from addenda.export.ends import tied_ends

__all__ = ["CONFIG", "KINDS", "TENSORS", "adapter_audit", "layers_without", "write_adapter"]

CONFIG = "adapter_config.json"
TENSORS = "adapters.safetensors"
KINDS = ("linear", "conv1d-transposed")
"""Layer kinds that are linear layers there."""

_BLOCK = re.compile(r"(?P<blocks>.*\b(?:layers|h|blocks))\.(?P<number>\d+)\.(?P<inside>.+)")


def why_not(kind: LayerKind) -> str | None:
    """Return why mlx-lm has no adapter for layers of this kind, or None where it has."""
    names = (kind.name,) if issubclass(kind.view, PartView) else (kind.name, kind.stands_for)
    return None if any(name in KINDS for name in names) else "mlx-lm has no low-rank adapter for it"


def layers_without(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return those of the paths at whose layers mlx-lm has no low-rank adapter; a tied head is no layer there."""
    kinds, ends = {path: kind_of(layer_at(model, path)) for path in paths}, tied_ends(paths, model)
    return [path for path, kind in kinds.items() if kind is None or why_not(kind) or path in ends]


def write_adapter(handle: Handle, folder: Path, *, base_name: str) -> None:
    """Write the adapter's two files into ``folder``, which exists, as mlx-lm's own training would leave them.

    mlx-lm gives all layers one rank and one scale: factors of a lower rank are filled up with zeros, and where the
    scalings differ, each is multiplied into its ``lora_b``.

    Args:
        handle: an adapter whose change of every layer is a product of two factors.
        folder: where the files go.
        base_name: what the adapter is for.

    Raises:
        ExportError: the change of a layer is no such product, or the layer is none of mlx-lm's.
    """
    terms = _terms(handle)
    scale, tensors = _folded(terms)
    rank = next(iter(tensors.values())).shape[1]
    depth = sum(1 for path, _ in handle.model.named_modules() if _is_block(path))
    number, keys = _keys(list(terms), depth)
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": rank, "scale": scale},
        "model": base_name,
        "num_layers": number,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "mlx"})


def _terms(handle: Handle) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and the scaling of every layer."""
    if other := layers_without(handle.model, handle.paths):
        raise ExportError(
            f"mlx-lm has no low-rank adapter for {len(other)} of the layers, first '{other[0]}'",
            hint="--type float32 writes the merged model",
        )
    found = {path: adapter.low_rank_term() for path, adapter in handle.adapters.items()}
    if without := [path for path, term in found.items() if term is None]:
        raise ExportError(
            f"method '{handle.method.name}' changes {len(without)} of the layers by something else than two factors, "
            f"first '{without[0]}'",
            hint="--type float32 writes the merged model",
        )
    return {path: term for path, term in found.items() if term is not None}


def _folded(terms: Mapping[str, tuple[Tensor, Tensor, float]]) -> tuple[float, dict[str, Tensor]]:
    """The one scale, and the tensors by name, of one rank."""
    scalings = {float(scaling) for _, _, scaling in terms.values()}
    scale = scalings.pop() if len(scalings) == 1 else 1.0
    rank = max(A.shape[0] for A, _, _ in terms.values())
    made = {}
    for path, (A, B, scaling) in terms.items():
        a, b = A.new_zeros(A.shape[1], rank, dtype=torch.float32), B.new_zeros(rank, B.shape[0]).float()
        a[:, : A.shape[0]] = A.detach().T
        b[: B.shape[1]] = (B.detach().float() * (float(scaling) / scale)).T
        made[f"{path}.lora_a"], made[f"{path}.lora_b"] = a.detach().cpu(), b.detach().cpu()
    return scale, made


def _is_block(path: str) -> bool:
    found = _BLOCK.fullmatch(path + ".x")
    return found is not None and found["inside"] == "x"


def _keys(paths: Sequence[str], depth: int) -> tuple[int, list[str]]:
    """How many of the last blocks are adapted, and the layers' names inside them; whole paths where those differ."""
    inside: dict[int, set[str]] = {}
    for path in paths:
        if not (found := _BLOCK.fullmatch(path)):
            return depth, sorted(paths)
        inside.setdefault(int(found["number"]), set()).add(found["inside"])
    blocks = sorted(inside)
    names = [inside[number] for number in blocks]
    alike = all(each == names[0] for each in names)
    if alike and blocks == list(range(depth - len(blocks), depth)):
        return len(blocks), sorted(names[0])
    return depth, sorted(paths)


# --------------------------------------------------------------------------------------------------- reading it back


def adapter_audit(handle: Handle, folder: Path) -> list[str]:
    """Return what a folder holds other than the adapter, each layer named."""
    try:
        found = load_file(folder / TENSORS)
        scale = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
    except (OSError, SafetensorError, ValueError, KeyError) as problem:
        return [f"{TENSORS} or {CONFIG} cannot be read: {problem}"]
    wanted_scale, wanted = _folded(_terms(handle))
    wrong = [] if scale == wanted_scale else [f"scale is {scale}, not {wanted_scale}"]
    wrong += [f"'{name}' is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"'{name}' belongs to nothing" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if told := _difference(name, found[name], wanted):
            wrong.append(told)
    return wrong


def _difference(name: str, found: Tensor, wanted: Mapping[str, Tensor]) -> str:
    if torch.equal(found, wanted[name]):
        return ""
    if found.shape != wanted[name].shape:
        turned = ": it is transposed" if found.T.shape == wanted[name].shape else ""
        return f"'{name}' has shape {tuple(found.shape)}, not {tuple(wanted[name].shape)}{turned}"
    owner = next((other for other, tensor in wanted.items() if torch.equal(found, tensor)), None)
    return f"'{name}' holds what belongs to '{owner}'" if owner else f"'{name}' holds other numbers"
