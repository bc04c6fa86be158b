"""Reading PEFT's folder: every setting it uses is honoured or refused by name, and every tensor has its place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from addenda.core.attaching import attach_paths
from addenda.core.contract import Base
from addenda.core.handle import Handle
from addenda.core.layers import layer_at, view_of
from addenda.core.planning import require_possible
from addenda.core.targets import adaptable, exact
from addenda.errors import CheckpointError, NotFoundError, UnsafeError
from addenda.export.peft.form import CONFIG, PREFIX, SHARED_PREFIX, TENSORS, Form, form_named, forms
from addenda.export.peft.stacked import is_target

__all__ = ["import_peft", "read_config", "view_at"]

_LITERAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_CONFIG_LIMIT = 2**20
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
)
"""Keys that every method has and that no adapter's arithmetic depends on."""
_NOTHING = ("bias = 'none'",)
"""Values that say that nothing is used."""


def import_peft(model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default") -> Handle:
    """Attach the adapter of a PEFT folder; it answers as under PEFT, and is frozen like any loaded adapter.

    Args:
        model: the base it was trained on.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the adapter's name on the model.

    Raises:
        NotFoundError: a file is missing.
        UnsafeError: the folder asks for what could run code: pickled weights, or a regular expression.
        CheckpointError: a setting has no counterpart here, or settings, tensors and model disagree. The model is
            then as it was.
    """
    source = Path(folder)
    config = read_config(source)
    form = _form(config, source)
    config, tensors = form.apart(model, config, _read_tensors(source, form))
    paths = _paths(form, tensors, source)
    method = form.read_settings(config, paths, tensors)
    _require_same_targets(model, config, paths, source)
    layers = exact(model, paths, lambda kind: None if form.has_layout(kind) else "PEFT has no layout for it")
    require_possible(method, layers)
    handle = attach_paths(
        model, method, list(layers), name=name, fill=lambda made: _fill(form, made, tensors, source)
    )
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    return handle


def read_config(source: Path) -> dict[str, Any]:
    """Return the configuration of a PEFT folder, checked for what could run code.

    Raises:
        NotFoundError: there is none.
        UnsafeError: the folder asks for what could run code.
        CheckpointError: it is no configuration.
    """
    path = source / CONFIG
    pickled = sorted(file.name for file in source.glob("*.bin")) + sorted(
        file.name for file in source.glob("*.pt")
    )
    if not path.is_file():
        raise NotFoundError(
            f"'{source}' holds no {CONFIG}", hint="name a folder written by PEFT's save_pretrained"
        )
    if pickled and not (source / TENSORS).is_file():
        raise UnsafeError(
            f"the weights are pickled ('{pickled[0]}'), and unpickling runs code",
            where={"folder": source},
            hint="save them again with PEFT's save_pretrained(..., safe_serialization=True)",
        )
    if path.stat().st_size > _CONFIG_LIMIT:
        raise _unfit(
            f"{CONFIG} has {path.stat().st_size:,} bytes, more than any adapter's configuration", source
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise _unfit(f"{CONFIG} is not JSON: {problem}", source) from problem
    if not isinstance(config, dict):
        raise _unfit(f"{CONFIG} is not a table", source)
    _require_safe(config, source)
    return config


def _require_safe(config: Mapping[str, Any], source: Path) -> None:
    patterns = [key for key in ("target_modules", "feedforward_modules") if isinstance(config.get(key), str)]
    patterns = [key for key in patterns if config[key] != "all-linear"]
    listed = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for key in ("target_modules", "feedforward_modules"):
        listed += config[key] if isinstance(config.get(key), list) else []
    odd = [f"{key} = {config[key]!r}" for key in patterns]
    odd += [repr(entry) for entry in listed if not (isinstance(entry, str) and _LITERAL.fullmatch(entry))]
    if odd:
        raise UnsafeError(
            f"layers are named by a regular expression, which is not run: {odd[0][:200]}",
            where={"folder": source, "expressions": len(odd)},
            hint="list the layers' names literally in target_modules, rank_pattern and alpha_pattern",
        )


def _read_tensors(source: Path, form: Form) -> dict[str, Tensor]:
    path = source / TENSORS
    if not path.is_file():
        raise NotFoundError(f"'{source}' lacks {TENSORS}", hint="copy the folder anew")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as problem:
        raise _unfit(f"{TENSORS} is damaged: {problem}", source) from problem
    bad = [
        key
        for key, t in tensors.items()
        if t.is_floating_point() != {*key.split(".")}.isdisjoint(form.whole)
        or not bool(torch.isfinite(t).all())
    ]
    if bad:
        raise _unfit(f"{len(bad)} tensors hold values that are no finite numbers, first '{bad[0]}'", source)
    return tensors


def _form(config: Mapping[str, Any], source: Path) -> Form:
    """Return the form of the configuration, all of whose settings have a counterpart here."""
    found = form_named(config.get("peft_type"))
    if found is None:
        known = ", ".join(form.peft_type for form in forms().values())
        raise _unfit(f"peft_type {config.get('peft_type')!r} is not read; {known} are", source)
    known_keys = {*found.reads, *found.harmless, *_HARMLESS}
    used = [f"{key} = {value!r}" for key, value in config.items() if value and key not in known_keys]
    used = [text[:100] for text in used if text not in _NOTHING]
    if used:
        raise _unfit(f"the adapter uses what this does not read: {', '.join(sorted(used))}", source)
    return found


def _paths(form: Form, tensors: Mapping[str, Tensor], source: Path) -> list[str]:
    """The adapted layers, from the tensors' names; a name of any other form belongs to nothing."""
    names = "|".join(re.escape(name) for name in form.names)
    pattern = re.compile(re.escape(PREFIX) + rf"(?P<path>[^\s]+?)\.({names})")
    found = {key: pattern.fullmatch(key) for key in tensors if not _is_shared(form, key)}
    extra = [key for key, match in found.items() if match is None]
    if extra or not found:
        raise _unfit(
            f"{len(extra)} tensors belong to nothing, first '{extra[0]}'" if extra else "no tensor", source
        )
    return list(dict.fromkeys(match["path"] for match in found.values() if match))


def _is_shared(form: Form, key: str) -> bool:
    rest = key.removeprefix(SHARED_PREFIX)
    return rest != key and rest.partition(".")[0] in form.shared_names


def _require_same_targets(
    model: nn.Module, config: Mapping[str, Any], paths: list[str], source: Path
) -> None:
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    named = {path for path, (layer, _) in adaptable(model).items() if is_target(path, layer, config)}
    missing, extra = sorted(named - set(paths)), sorted(set(paths) - named)
    if missing:
        raise _unfit(f"{len(missing)} target layers have no tensors, first '{missing[0]}'", source)
    if extra:
        raise _unfit(
            f"{len(extra)} layers have tensors but are no target of this model, first '{extra[0]}'", source
        )


def _fill(form: Form, handle: Handle, tensors: Mapping[str, Tensor], source: Path) -> None:
    adapters = {path: (adapter, view_at(handle, path)) for path, adapter in handle.adapters.items()}
    wanted = {
        f"{PREFIX}{path}.{name}": place
        for path, (adapter, layer) in adapters.items()
        for name, place in form.tensors(adapter, layer).items()
    }
    common = next(iter(handle.adapters.values())).common
    shared = {} if common is None else form.shared(common)
    wanted.update({SHARED_PREFIX + name: place for name, place in shared.items()})
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        word = f"'{missing[0]}' is missing" if missing else f"'{extra[0]}' belongs to nothing"
        raise _unfit(f"{word} ({len(missing)} missing, {len(extra)} too many)", source)
    for key, place in wanted.items():
        if place.shape != tensors[key].shape:
            found, expected = tuple(tensors[key].shape), tuple(place.shape)
            raise _unfit(f"'{key}' has shape {found}; its settings and layer ask for {expected}", source)
    with torch.no_grad():
        for name, place in shared.items():
            place.copy_(tensors[SHARED_PREFIX + name])
    for path, (adapter, layer) in adapters.items():
        names = form.tensors(adapter, layer)
        form.fill(adapter, layer, {name: tensors[f"{PREFIX}{path}.{name}"] for name in names})


def view_at(handle: Handle, path: str) -> Base:
    """Return the adapted layer at ``path`` as its adapter sees it."""
    return view_of(layer_at(handle.model, path), path)


def _unfit(problem: str, source: Path) -> CheckpointError:
    return CheckpointError(
        problem,
        where={"folder": source},
        hint="export it anew for this base, with settings that are read here",
    )
