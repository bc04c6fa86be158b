"""Reading mlx-lm's adapter folder: every setting is honoured or refused by name, and every tensor has its place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from addenda.core.attaching import attach_paths
from addenda.core.handle import Handle
from addenda.core.planning import require_possible
from addenda.core.targets import exact
from addenda.errors import CheckpointError, NotFoundError
from addenda.export.mlx.folder import CONFIG, TENSORS, why_not
from addenda.methods.lora import LoRA

__all__ = ["import_mlx", "is_mlx", "read_config"]

_LIMIT = 2**20


def is_mlx(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has the files of an adapter of mlx-lm's."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / TENSORS).is_file()


def read_config(source: Path) -> dict[str, Any]:
    """Return the configuration of a folder.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it is not one of mlx-lm's low-rank adapters.
    """
    path = source / CONFIG
    if not path.is_file():
        raise NotFoundError(f"'{source}' holds no {CONFIG}", hint="name a folder written by mlx_lm.lora")
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _LIMIT else None
    except (ValueError, RecursionError) as problem:
        raise _unfit(f"{CONFIG} is damaged: {problem}", source) from problem
    if not isinstance(config, dict) or not isinstance(config.get("lora_parameters"), dict):
        raise _unfit(f"{CONFIG} has no lora_parameters", source)
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise _unfit(f"fine_tune_type {kind!r} is not read; 'lora' is", source)
    return config


def import_mlx(model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default") -> Handle:
    """Attach the adapter of a folder of mlx-lm's; it answers as there, and is frozen like any loaded adapter.

    Args:
        model: the base it was trained on.
        folder: holds ``adapter_config.json`` and ``adapters.safetensors``.
        name: the adapter's name on the model.

    Raises:
        NotFoundError: a file is missing.
        CheckpointError: settings, tensors and model disagree, or a setting has no counterpart here. The model is
            then as it was.
    """
    source = Path(folder)
    config = read_config(source)
    rank, scale = _numbers(config["lora_parameters"], source)
    factors = _factors(_tensors(source), rank, source)
    _require_named(config, list(factors), source)
    method = LoRA(rank=rank, alpha=_alpha(scale, rank))
    layers = exact(model, list(factors), why_not)
    require_possible(method, layers)
    handle = attach_paths(
        model, method, list(layers), name=name, fill=lambda made: _fill(made, factors, source)
    )
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    return handle


def _numbers(settings: Mapping[str, Any], source: Path) -> tuple[int, float]:
    rank, scale = settings.get("rank"), settings.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _unfit(f"rank = {rank!r} is no rank", source)
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise _unfit(f"scale = {scale!r} is no scale", source)
    return rank, float(scale)


def _alpha(scale: float, rank: int) -> float:
    """The numerator of which the quotient by the rank is the scale, to the bit where there is one."""
    near = scale * rank
    every = (near, math.nextafter(near, math.inf), math.nextafter(near, 0.0))
    return next((alpha for alpha in every if alpha / rank == scale), near)


def _tensors(source: Path) -> dict[str, Tensor]:
    if not (source / TENSORS).is_file():
        raise NotFoundError(f"'{source}' lacks {TENSORS}", hint="copy the folder anew")
    try:
        tensors = load_file(source / TENSORS)
    except (SafetensorError, ValueError) as problem:
        raise _unfit(f"{TENSORS} is damaged: {problem}", source) from problem
    bad = [
        key for key, t in tensors.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())
    ]
    if bad:
        raise _unfit(f"{len(bad)} tensors hold values that are no finite numbers, first '{bad[0]}'", source)
    return tensors


def _factors(tensors: Mapping[str, Tensor], rank: int, source: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_a and lora_b by the layer's path."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, end = key.rpartition(".")
        if end not in {"lora_a", "lora_b"} or not path:
            raise _unfit(f"tensor '{key}' belongs to nothing", source)
        if tensor.ndim != 2 or tensor.shape[end == "lora_a"] != rank:
            raise _unfit(f"'{key}' has shape {tuple(tensor.shape)}, which is not of rank {rank}", source)
        found.setdefault(path, {})[end] = tensor
    alone = [path for path, both in found.items() if len(both) < 2]
    if alone or not found:
        raise _unfit(f"'{alone[0]}' has one factor of two" if alone else "it has no tensor", source)
    return {path: (both["lora_a"], both["lora_b"]) for path, both in found.items()}


def _require_named(config: Mapping[str, Any], paths: list[str], source: Path) -> None:
    """Refuse tensors of layers that the configuration would not adapt."""
    keys = config["lora_parameters"].get("keys")
    if keys is None:
        return
    if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
        raise _unfit(f"keys = {keys!r} is no list of names", source)
    extra = [path for path in paths if not any(path == key or path.endswith(f".{key}") for key in keys)]
    if extra:
        raise _unfit(f"{len(extra)} layers have tensors but are none of the keys, first '{extra[0]}'", source)


def _fill(handle: Handle, factors: Mapping[str, tuple[Tensor, Tensor]], source: Path) -> None:
    for path, adapter in handle.adapters.items():
        held, (a, b) = cast(Any, adapter), factors[path]
        for name, mine, theirs in (("lora_a", held.A, a.T), ("lora_b", held.B, b.T)):
            if mine.shape != theirs.shape:
                raise _unfit(
                    f"'{path}.{name}' has shape {tuple(theirs.T.shape)}; its layer asks for {tuple(mine.T.shape)}",
                    source,
                )
            with torch.no_grad():
                mine.copy_(theirs)


def _unfit(problem: str, source: Path) -> CheckpointError:
    return CheckpointError(
        problem,
        where={"folder": source},
        hint="export it anew for this base, with settings that are read here",
    )
