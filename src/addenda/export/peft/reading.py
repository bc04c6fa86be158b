"""Reading PEFT's folder: every setting it uses is honoured or refused by name, and every tensor has its place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from addenda.core.attaching import attach_paths
from addenda.core.contract import Base
from addenda.core.handle import Handle
from addenda.core.layers import layer_at, view_of
from addenda.core.planning import require_possible
from addenda.core.targets import adaptable
from addenda.core.whole import WholeAdapter, exact_layers
from addenda.errors import CheckpointError, NotFoundError, UnsafeError
from addenda.export.peft.form import CONFIG, PREFIX, SHARED_PREFIX, TENSORS, Form, form_of, forms
from addenda.export.peft.stacked import is_target
from addenda.export.peft.values import set_values, values

__all__ = ["UNREAD", "import_peft", "known_keys", "read_config", "view_at"]

UNREAD: Mapping[str, str] = {}
"""Types of PEFT's that are neither read nor written, with the reason."""

_LITERAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_CONFIG_LIMIT = 2**20
_LEAVES_OUT = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Keys that leave out some of the targets; which ones the tensors' names tell."""
_HARMLESS = (
    *_LEAVES_OUT,
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
)
"""Keys that every method has and that no adapter's arithmetic depends on."""
_BASE_LAYER = ".base_layer."
_IN_MIXTURE = "base_model.lora_model.model."
"""What PEFT writes for `PREFIX` where an adapter is one of a mixture's."""
_PATTERNS = ("rank_pattern", "alpha_pattern", "lambda_pattern")
"""Keys under which values stand by names of layers."""
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

    The adapters that a mixture mixes are attached before it, as ``<name>-0``, ``<name>-1`` and so on.
    """
    source = Path(folder)
    config = read_config(source)
    form = _form(config, source)
    mixed: list[Handle] = []
    try:
        for inside in form.mixed(config):
            mixed.append(import_peft(model, source / inside, name=f"{name}-{inside}"))
        return _import(model, source, config, form, mixed, name=name)
    except BaseException:
        for handle in reversed(mixed):
            handle.detach()
        raise


def _import(
    model: nn.Module, source: Path, config: dict[str, Any], form: Form, mixed: Sequence[Handle], *, name: str
) -> Handle:
    tensors = _without_base(model, config, _read_tensors(source), source)
    _require_numbers(form, tensors, source)
    config, tensors = form.apart(model, config, tensors)
    whole: list[str] = []
    if mixed:
        config["adapters"] = [handle.name for handle in mixed]
        paths = list(dict.fromkeys(path for handle in mixed for path in handle.own().paths))
    elif form.of_model:
        paths = _at_the_model(form, model, tensors, source)
    else:
        paths, whole = _paths(form, config, tensors, source)
    method = replace(form.read_settings(config, paths, tensors), whole=tuple(whole))
    along = form.along(model, paths)
    _require_same_targets(model, config, paths, along, source)
    _require_saved(model, config, whole, source)
    named = list(dict.fromkeys([*paths, *along, *whole]))
    layers = exact_layers(model, method, named, why_not=form.why_not)
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
    known = form_of(config)
    patterns = [key for key in ("target_modules", "feedforward_modules") if isinstance(config.get(key), str)]
    patterns = [] if known is not None and known.literal_targets else patterns
    patterns = [key for key in patterns if config[key] != "all-linear"]
    listed = [entry for key in _PATTERNS for entry in config.get(key) or {}]
    for key in ("target_modules", "feedforward_modules"):
        listed += config[key] if isinstance(config.get(key), list) else []
    odd = [f"{key} = {config[key]!r}" for key in patterns]
    odd += [repr(entry) for entry in listed if not (isinstance(entry, str) and _LITERAL.fullmatch(entry))]
    if odd:
        raise UnsafeError(
            f"layers are named by a regular expression, which is not run: {odd[0][:200]}",
            where={"folder": source, "expressions": len(odd)},
            hint="list the layers' names literally in target_modules and the patterns",
        )


def _read_tensors(source: Path) -> dict[str, Tensor]:
    path = source / TENSORS
    if not path.is_file():
        raise NotFoundError(f"'{source}' lacks {TENSORS}", hint="copy the folder anew")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as problem:
        raise _unfit(f"{TENSORS} is damaged: {problem}", source) from problem
    return {
        PREFIX + key.removeprefix(_IN_MIXTURE) if key.startswith(_IN_MIXTURE) else key: tensor
        for key, tensor in tensors.items()
    }


def _require_numbers(form: Form, tensors: Mapping[str, Tensor], source: Path) -> None:
    integers = {key for key in tensors if not {*key.split(".")}.isdisjoint(form.integers)}
    bad = [
        key
        for key, t in tensors.items()
        if t.is_floating_point() == (key in integers) or not bool(torch.isfinite(t).all())
    ]
    if bad:
        raise _unfit(f"{len(bad)} tensors hold values that are no finite numbers, first '{bad[0]}'", source)


def _without_base(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Leave out weights of the base, which PEFT writes beside an adapted embedding; they must be this base's."""
    own = dict(model.named_parameters(remove_duplicate=False))
    names = {
        key: key.removeprefix(PREFIX).replace(_BASE_LAYER, ".") for key in tensors if key.startswith(PREFIX)
    }
    saved = _saved(config, source)  # trained anew, and so no longer the base's
    held = {
        key: own[name]
        for key, name in names.items()
        if name in own and not _is_saved(name.rpartition(".")[0], saved)
    }
    other = [key for key, value in held.items() if not _same(tensors[key], value.detach())]
    if other:
        raise _unfit(f"'{other[0]}' is a weight of the base, and not this base's", source)
    return {key: value for key, value in tensors.items() if key not in held}


def _same(saved: Tensor, own: Tensor) -> bool:
    return saved.shape == own.shape and torch.equal(saved.to(own.dtype), own.cpu())


def known_keys(form: Form) -> set[str]:
    """Return the keys of a configuration that are read, or change nothing of what a trained adapter computes."""
    return {*form.reads, *form.harmless, *_HARMLESS}


def _form(config: Mapping[str, Any], source: Path) -> Form:
    """Return the form of the configuration, all of whose settings have a counterpart here."""
    found = form_of(config)
    if found is None:
        known = ", ".join(dict.fromkeys(form.peft_type for form in forms().values()))
        named = config.get("peft_type")
        why = f": {UNREAD[named]}" if isinstance(named, str) and named in UNREAD else ""
        raise _unfit(f"peft_type {named!r} is not read{why}; {known} are", source)
    known_to_it = known_keys(found)
    used = [f"{key} = {value!r}" for key, value in config.items() if value and key not in known_to_it]
    used = [text[:100] for text in used if text not in _NOTHING]
    if used:
        raise _unfit(f"the adapter uses what this does not read: {', '.join(sorted(used))}", source)
    return found


def _at_the_model(form: Form, model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> list[str]:
    """The one place for an adapter on the whole model; a tensor of another name belongs to nothing."""
    extra = sorted(tensors.keys() - set(form.names))
    if extra:
        raise _unfit(f"{len(extra)} tensors belong to nothing, first '{extra[0]}'", source)
    found = [path for path, (_, kind) in adaptable(model).items() if kind.among(form.kinds)]
    if len(found) != 1:
        raise _unfit(
            f"the model has {len(found)} transformers that a prompt could stand in front of, not one", source
        )
    return found


def _paths(
    form: Form, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path
) -> tuple[list[str], list[str]]:
    """The adapted layers and those saved whole, from the tensors' names; any other name belongs to nothing."""
    names = "|".join(re.escape(name) for name in form.names)
    pattern = re.compile(re.escape(PREFIX) + rf"(?P<path>[^\s]+?)\.({names})")
    saved = re.compile(re.escape(PREFIX) + r"(?P<path>[^\s]+?)\.(weight|bias)")
    found: dict[str, None] = {}
    whole: dict[str, None] = {}
    extra = []
    for key in tensors:
        if match := pattern.fullmatch(key):
            found[match["path"]] = None
        elif (match := saved.fullmatch(key)) and _is_saved(match["path"], _saved(config, source)):
            whole[match["path"]] = None
        elif not _is_shared(form, key):
            extra.append(key)
    if extra or not found:
        raise _unfit(
            f"{len(extra)} tensors belong to nothing, first '{extra[0]}'" if extra else "no tensor", source
        )
    return list(found), list(whole)


def _saved(config: Mapping[str, Any], source: Path) -> list[str]:
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(entry, str) and entry for entry in saved):
        raise _unfit(f"modules_to_save = {saved!r} is no list of names", source)
    return saved


def _is_saved(path: str, saved: list[str]) -> bool:
    """Whether the layer at ``path``, or a module around it, has a name that ends as one of ``saved``, as PEFT asks."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts) + 1) for entry in saved)


def _require_saved(model: nn.Module, config: Mapping[str, Any], whole: list[str], source: Path) -> None:
    saved, inside = _saved(config, source), tuple(f"{path}." for path in whole)
    names = [name for name, _ in model.named_parameters() if _is_saved(name.rpartition(".")[0], saved)]
    missing = [name for name in names if not name.startswith(inside)]
    if missing or (saved and not whole):
        word = f", first of '{missing[0]}'" if missing else ""
        raise _unfit(f"modules_to_save names {', '.join(saved)}, of which tensors are missing{word}", source)


def _is_shared(form: Form, key: str) -> bool:
    rest = key.removeprefix(SHARED_PREFIX)
    return rest != key and rest.partition(".")[0] in form.shared_names


def _require_same_targets(
    model: nn.Module, config: Mapping[str, Any], paths: list[str], along: list[str], source: Path
) -> None:
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    saved = _saved(config, source)
    named = {
        path
        for path, (layer, _) in adaptable(model).items()
        if is_target(path, layer, config) and not _is_saved(path, saved)
    }
    missing, extra = sorted(named - {*paths, *along}), sorted({*paths} - {*named, *along})
    if missing and not any(config.get(key) not in (None, []) for key in _LEAVES_OUT):
        raise _unfit(f"{len(missing)} target layers have no tensors, first '{missing[0]}'", source)
    if extra:
        raise _unfit(
            f"{len(extra)} layers have tensors but are no target of this model, first '{extra[0]}'", source
        )


def _fill(form: Form, handle: Handle, tensors: Mapping[str, Tensor], source: Path) -> None:
    own = handle.own()
    adapters = {path: (adapter, view_at(handle, path)) for path, adapter in own.adapters.items()}
    whole = {
        path: (cast(WholeAdapter, adapter), view_at(handle, path))
        for path, adapter in handle.adapters.items()
        if path not in adapters
    }
    for adapter, layer in adapters.values():
        form.prepare(adapter, layer, handle.method)
    wanted = {
        form.key(path, name): place
        for path, (adapter, layer) in adapters.items()
        for name, place in form.tensors(adapter, layer).items()
    }
    wanted.update(
        (f"{PREFIX}{path}.{name}", place)
        for path, (adapter, layer) in whole.items()
        for name, place in values(adapter, layer).items()
    )
    optional = {key for key in wanted if any(key.endswith(f".{name}") for name in form.optional)}
    common = next(iter(own.adapters.values())).common
    shared = {} if common is None else form.shared(common)
    wanted.update({SHARED_PREFIX + name: place for name, place in shared.items()})
    missing, extra = sorted(wanted.keys() - tensors.keys() - optional), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        word = f"'{missing[0]}' is missing" if missing else f"'{extra[0]}' belongs to nothing"
        raise _unfit(f"{word} ({len(missing)} missing, {len(extra)} too many)", source)
    for key, place in wanted.items():
        if key in tensors and place.shape != tensors[key].shape:
            found, expected = tuple(tensors[key].shape), tuple(place.shape)
            raise _unfit(f"'{key}' has shape {found}; its settings and layer ask for {expected}", source)
    _require_one_value(wanted, tensors, source)
    with torch.no_grad():
        for name, place in shared.items():
            place.copy_(tensors[SHARED_PREFIX + name])
    for path, (adapter, layer) in adapters.items():
        form.fill(adapter, layer, _given(tensors, {name: form.key(path, name) for name in form.names}))
    for path, (changed, layer) in whole.items():
        set_values(
            changed, layer, _given(tensors, {name: f"{PREFIX}{path}.{name}" for name in ("weight", "bias")})
        )
    if problems := form.problems(own):
        raise _unfit("; ".join(problems), source)


def _given(tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Those of the tensors that the file has, by their short names."""
    return {name: tensors[key] for name, key in keys.items() if key in tensors}


def _require_one_value(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse a folder that gives several values to one tensor, as where layers share otherwise than here."""
    first: dict[tuple[int, ...], str] = {}
    for key, place in wanted.items():
        if key not in tensors:
            continue
        other = first.setdefault((place.data_ptr(), *place.shape), key)
        if not torch.equal(tensors[other], tensors[key]):
            raise _unfit(f"'{other}' and '{key}' differ, and these layers share it here", source)


def view_at(handle: Handle, path: str) -> Base:
    """Return the adapted layer at ``path`` as its adapter sees it."""
    return view_of(layer_at(handle.model, path), path)


def _unfit(problem: str, source: Path) -> CheckpointError:
    return CheckpointError(
        problem,
        where={"folder": source},
        hint="export it anew for this base, with settings that are read here",
    )
