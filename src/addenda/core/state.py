"""The native adapter folder: ``adapter.safetensors`` and ``adapter.json``, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from addenda.core import registry
from addenda.core.attaching import attach_paths
from addenda.core.contract import Method
from addenda.core.fingerprints import fingerprint
from addenda.core.handle import Handle, handles
from addenda.core.host import require_module
from addenda.core.planning import require_possible
from addenda.core.through import require_roundable, rounding_of
from addenda.core.whole import exact_layers
from addenda.errors import CheckpointError, ConfigError, MethodError, NotFoundError, TargetError

__all__ = ["FORMAT_VERSION", "load", "publish", "read_manifest", "save"]

FORMAT_VERSION = 2
"""2 came with adapters that are trained through a rounding: what reads 1 alone would answer with another weight. All
others are written as 1."""
_TENSORS, _MANIFEST = "adapter.safetensors", "adapter.json"
_MANIFEST_LIMIT = 16 * 2**20


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write one adapter of the model to a folder, atomically.

    Args:
        model: a model that carries an adapter.
        folder: where to write; an adapter folder that is there already is replaced, any other content is refused.
        name: which adapter; may be left out where there is only one.
        provenance: JSON-able facts about how it was trained, kept beside the weights.

    Returns:
        The folder.

    Raises:
        NotFoundError: the model carries no such adapter.
        CheckpointError: a value is not finite, or the folder holds something else.
        ConfigError: the provenance is not JSON-able.

    Example:
        >>> import addenda, tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"])
        >>> path = addenda.save(model, tempfile.mkdtemp() + "/adapter")
        >>> sorted(file.name for file in path.iterdir())
        ['adapter.json', 'adapter.safetensors']
    """
    handle = _the_one(model, name)
    target = Path(folder)
    _require_replaceable(target)
    _require_values(handle)
    _require_plain(provenance)
    tensors = _tensors(handle)
    _require_finite(tensors, f"adapter '{handle.name}'")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        save_file(tensors, beside / _TENSORS)
        manifest = _manifest(handle, beside / _TENSORS, provenance or {})
        (beside / _MANIFEST).write_text(
            json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        publish(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def load(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None, trainable: bool = False
) -> Handle:
    """Attach an adapter from a folder written by :func:`save`.

    Args:
        model: the base the adapter was trained on.
        folder: the adapter folder.
        name: the name to give it; None keeps the saved one.
        trainable: whether its parameters should train on.

    Raises:
        NotFoundError: the folder holds no adapter.
        CheckpointError: the files are damaged, disagree, hold non-finite values, or belong to another base. The
            model is then as it was.

    Example:
        >>> import addenda, tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> handle = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name="support")
        >>> folder = addenda.save(model, tempfile.mkdtemp() + "/adapter")
        >>> handle.detach()
        >>> addenda.load(model, folder)
        <Handle 'support': lora, 1 layers, 24 parameters, active>
    """
    require_module(model)
    source = Path(folder)
    manifest = read_manifest(source)
    _require_same_base(model, manifest, source)
    tensors = _verified_tensors(source, manifest)
    try:
        method = registry.get(manifest["method"]).from_settings(manifest["settings"])
        _require_same_mixed(model, method, manifest, source)
        layers = exact_layers(model, method, manifest["layers"])
        through = manifest.get("through")
        views = require_possible(method, layers)
        if through is not None:
            require_roundable(model, method, views, rounding_of(through))
    except (ConfigError, MethodError, NotFoundError, TargetError) as problem:
        raise CheckpointError(
            f"the adapter's settings do not fit: {problem.message}",
            where={"folder": source},
            hint=problem.hint,
        ) from problem
    handle = attach_paths(
        model,
        method,
        list(layers),
        name=name or manifest["name"],
        through=through,
        fill=lambda made: _fill(made, tensors, source),
    )
    for parameter in handle.parameters():
        parameter.requires_grad_(trainable)
    return handle


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of an adapter folder's ``adapter.json``, checked for form.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it is not one of ours, or of a newer format.
    """
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"'{folder}' holds no adapter",
            where={"looked for": path},
            hint="name a folder written by addenda.save",
        )
    _refuse(
        f"'{path}' is too large to be an adapter's manifest",
        path,
        unless=path.stat().st_size <= _MANIFEST_LIMIT,
    )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(
            f"'{path}' is not readable: {problem}", where={"file": path}, hint="copy the adapter folder anew"
        ) from problem
    _require_form(manifest, path)
    return dict(manifest)


def _require_form(manifest: Any, path: Path) -> None:
    shape = {
        "format_version": int,
        "method": str,
        "settings": dict,
        "name": str,
        "layers": list,
        "base": dict,
    }
    shape["files"] = dict
    _refuse(f"'{path}' is not an adapter's manifest", path, unless=isinstance(manifest, dict))
    if "mixes" in manifest:
        shape["mixes"] = dict
    if "through" in manifest:
        shape["through"] = str
    wrong = [key for key, kind in shape.items() if not isinstance(manifest.get(key), kind)]
    _refuse(f"'{path}' lacks or misstates {', '.join(wrong)}", path, unless=not wrong)
    _refuse(
        f"'{path}' misstates layers",
        path,
        unless=bool(manifest["layers"]) and all(isinstance(layer, str) for layer in manifest["layers"]),
    )
    version = manifest["format_version"]
    _refuse(
        f"'{path}' has format version {version}; this reads up to {FORMAT_VERSION}",
        path,
        unless=1 <= version <= FORMAT_VERSION,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if twice:
        raise ValueError(f"duplicate key {twice[0]!r}")
    return dict(pairs)


def _the_one(model: nn.Module, name: str | None) -> Handle:
    on_model = handles(model)
    chosen = name or (next(iter(on_model)) if len(on_model) == 1 else None)
    if chosen is None or chosen not in on_model:
        raise NotFoundError(
            f"the model carries no adapter '{name}'"
            if name
            else f"the model carries {len(on_model)} adapters, not one",
            where={"adapters": " ".join(on_model) or "none"},
            hint="name the adapter: addenda.save(model, folder, name=...)"
            if on_model
            else "attach one first",
        )
    return on_model[chosen]


def _tensors(handle: Handle) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in handle.tensors(training=False).items()}


def _manifest(handle: Handle, tensors: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    manifest = {
        "format_version": 1 if handle.through is None else FORMAT_VERSION,
        "method": handle.method.name,
        "settings": handle.method.settings(),
        "name": handle.name,
        "layers": handle.paths,
        "base": {"fingerprint": fingerprint(handle.model), "class": _class_name(handle.model)},
        "files": {_TENSORS: {"sha256": _sha256(tensors), "bytes": tensors.stat().st_size}},
        "provenance": dict(provenance),
    }
    if handle.through is not None:
        manifest["through"] = handle.through
    if handle.method.mixes():
        manifest["mixes"] = _digests(handle.model, handle.method)
    return manifest


def _digests(model: nn.Module, method: Method) -> dict[str, str]:
    """Return a digest of each adapter that a mixture mixes: of its method, its settings and its values, by name."""
    on_model = handles(model)
    return {name: _digest(on_model[name]) for name in method.mixes() if name in on_model}


def _digest(handle: Handle) -> str:
    made = json.dumps([handle.method.name, handle.method.settings()], sort_keys=True, default=list)
    digest = hashlib.sha256(made.encode())
    for name, value in sorted(_tensors(handle).items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return "sha256-" + digest.hexdigest()


def _require_same_mixed(model: nn.Module, method: Method, manifest: Mapping[str, Any], source: Path) -> None:
    """Refuse a mixture whose adapters are not on the model, or are not those that it was trained over."""
    saved, here = dict(manifest.get("mixes", {})), _digests(model, method)
    problems = [f"'{name}' is not on the model" for name in method.mixes() if name not in here]
    problems += [f"'{name}' is another adapter" for name in here if saved.get(name) != here[name]]
    if problems:
        raise CheckpointError(
            f"the mixture was trained over other adapters than these: {'; '.join(problems)}",
            where={"folder": source, "adapters": " ".join(handles(model)) or "none"},
            hint="load the adapters that it mixes first, under the names they had",
        )


def _class_name(model: nn.Module) -> str:
    return getattr(type(model), "original_class", type(model)).__name__


def _verified_tensors(source: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    path = source / _TENSORS
    if not path.is_file():
        raise NotFoundError(
            f"'{source}' lacks {_TENSORS}", where={"folder": source}, hint="copy the folder anew"
        )
    stated = manifest["files"].get(_TENSORS)
    whole = isinstance(stated, dict) and stated.get("sha256") == _sha256(path)
    _refuse(f"'{path}' is not the file its manifest describes (SHA-256 differs)", source, unless=whole)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as problem:
        raise CheckpointError(
            f"'{path}' is damaged: {problem}", where={"file": path}, hint="copy it anew"
        ) from problem
    _require_finite(tensors, f"'{path}'")
    return tensors


def _require_same_base(model: nn.Module, manifest: Mapping[str, Any], source: Path) -> None:
    trained, here = manifest["base"].get("fingerprint"), fingerprint(model)
    if trained != here:
        raise CheckpointError(
            "the adapter was trained on another base",
            where={
                "folder": source,
                "trained on": f"{manifest['base'].get('class')} {trained}",
                "this base": f"{_class_name(model)} {here}",
            },
            hint="load the base named in the adapter's provenance",
        )


def _require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(
            f"{what} holds values that are not finite in {len(bad)} tensors, first '{bad[0]}'",
            hint="such an adapter answers nothing: train again with a lower learning rate",
        )


def _refuse(problem: str, place: Path, *, unless: bool) -> None:
    if not unless:
        raise CheckpointError(
            problem, where={"place": place}, hint="copy the adapter folder anew, or train it again"
        )


def _fill(handle: Handle, tensors: Mapping[str, Tensor], source: Path) -> None:
    wanted = handle.tensors(training=False)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    _refuse(f"{len(missing)} tensors are missing, first '{(missing or [''])[0]}'", source, unless=not missing)
    _refuse(f"{len(extra)} tensors belong to nothing, first '{(extra or [''])[0]}'", source, unless=not extra)
    for key, value in wanted.items():
        given = tensors[key]
        same = value.shape == given.shape
        _refuse(f"'{key}' has shape {tuple(given.shape)}, not {tuple(value.shape)}", source, unless=same)
        with torch.no_grad():
            value.copy_(given)


def _require_values(handle: Handle) -> None:
    if any(parameter.is_meta for parameter in handle.parameters()):
        raise CheckpointError(
            f"adapter '{handle.name}' has no values: it is on the meta device",
            hint="load the base's values before attaching",
        )


def _require_plain(provenance: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(provenance, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise ConfigError(
            f"the provenance cannot be written as JSON: {problem}",
            hint="give texts, finite numbers, lists and mappings",
        ) from problem


def _require_replaceable(target: Path) -> None:
    if target.name in ("", ".."):
        raise CheckpointError(
            f"'{target}' cannot be replaced as a whole",
            where={"folder": target.resolve()},
            hint="name a folder for the adapter alone, such as 'adapter'",
        )
    if target.exists() and not (
        target.is_dir() and ((target / _MANIFEST).exists() or not any(target.iterdir()))
    ):
        raise CheckpointError(
            f"'{target}' exists and is no adapter folder",
            where={"folder": target},
            hint="choose another folder",
        )


def publish(beside: Path, target: Path) -> None:
    """Flush the new folder to disk, then put it in the place of the old one."""
    for file in (path for path in beside.rglob("*") if path.is_file()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    beside.chmod(0o755)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        os.replace(target, old / "replaced")
        os.replace(beside, target)
        shutil.rmtree(old)
    else:
        os.replace(beside, target)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
