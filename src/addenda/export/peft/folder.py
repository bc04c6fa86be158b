"""Writing PEFT's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from addenda.core.handle import Handle, handles
from addenda.core.layers import kind_of, layer_at
from addenda.core.layers.experts import ExpertPart
from addenda.core.parts import Part
from addenda.core.whole import WholeAdapter
from addenda.errors import ExportError
from addenda.export.peft.form import CONFIG, PREFIX, SHARED_PREFIX, TENSORS, Form, form_for
from addenda.export.peft.reading import view_at
from addenda.export.peft.stacked import target_of
from addenda.export.peft.values import values

__all__ = ["layers_without", "write_peft"]


def write_peft(
    handle: Handle,
    folder: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    revision: str | None = None,
) -> None:
    """Write the adapter's two files into ``folder``, which exists, as PEFT's own ``save_pretrained`` would.

    Args:
        handle: an adapter of a method that PEFT has too.
        folder: where the files go.
        base_name: what PEFT should load as the base: best a hub id.
        revision: the base's commit, if it has one.

    Raises:
        ExportError: PEFT has no form for this method, or for one of its layers.
    """
    form, own, whole = _require_expressible(handle), handle.own(), _whole(handle)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": sorted(whole) or None,
        "revision": revision,
        "target_modules": _targets(own),
        "task_type": "CAUSAL_LM" if hasattr(handle.model, "lm_head") else None,
    }
    if any(_kind(own, path) == "conv1d-transposed" for path in own.paths):
        config["fan_in_fan_out"] = True  # methods that PEFT does not have for such layers lack the key
    config.update(form.settings(own), peft_type=form.peft_type)
    config, tensors = form.together(own, config, _foreign_tensors(form, own))
    config = {key: value for key, value in config.items() if key not in form.unknown}
    path = Path(folder)
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({**tensors, **_whole_tensors(handle, whole)}, path / TENSORS, metadata={"format": "pt"})
    for name, inside in zip(own.method.mixes(), form.mixed(config), strict=True):
        (path / inside).mkdir()
        write_peft(handles(own.model)[name], path / inside, base_name=base_name, revision=revision)


def _require_expressible(handle: Handle) -> Form:
    """Return the form of the adapter.

    Raises:
        ExportError: PEFT has no form for the method, or for one of its layers, or it is trained through a rounding.
    """
    if handle.through is not None:
        raise ExportError(
            f"'{handle.name}' is trained through {handle.through}: added to the weight as it is, it answers otherwise",
            hint="'--to merged' writes the weights that it is trained with",
        )
    method, form = handle.method, form_for(handle.method)
    if form is None:
        reason = (
            "PEFT has no bottleneck adapters" if method.name == "bottleneck" else "PEFT has no such method"
        )
        advice = "'--to merged' keeps it" if method.mergeable else "the native folder is its only form"
        raise ExportError(f"method '{method.name}' cannot be written for PEFT: {reason}", hint=advice)
    if other := layers_without(form, handle.model, handle.own().paths):
        raise ExportError(
            f"PEFT has no form for {len(other)} of the adapted layers, first '{other[0]}'",
            where={"kind": _kind(handle, other[0])},
            hint=f"it has one for the kinds {', '.join(form.kinds)}; '--to merged' keeps all layers",
        )
    problems = form.problems(handle.own())
    if "modules_to_save" in form.unknown and _whole(handle):
        problems.append(f"PEFT's {form.peft_type} has no modules_to_save")
    if held := [path for path in _whole(handle) if isinstance(layer_at(handle.model, path), Part)]:
        problems.append(f"'{held[0]}' is part of a module, and PEFT trains whole modules alone")
    if handle.merged and any(isinstance(adapter, WholeAdapter) for adapter in handle.adapters.values()):
        problems.append("it is merged, so that its change is part of the base's values")
    if problems:
        raise ExportError("; ".join(problems), hint="the native folder keeps it")
    return form


def layers_without(form: Form, model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return those of the paths at whose layers a form has no layout in PEFT."""
    kinds = {path: kind_of(layer_at(model, path)) for path in paths}
    return [path for path, kind in kinds.items() if kind is None or form.why_not(kind)]


def _kind(handle: Handle, path: str) -> str:
    kind = kind_of(layer_at(handle.model, path))
    return kind.name if kind else "unknown"


def _targets(handle: Handle) -> list[str]:
    """Last names where they name exactly the adapted layers, as serving engines like them; else whole paths."""
    layers = {path: layer_at(handle.model, path) for path in handle.paths}
    paths = {target_of(path, layer) for path, layer in layers.items() if not isinstance(layer, ExpertPart)}
    names = sorted({path.rpartition(".")[2] for path in paths})
    named = {
        path
        for path, module in handle.model.named_modules()
        if ".adapters." not in path and not isinstance(module, Part) and path.rpartition(".")[2] in names
    }
    return names if named == paths else sorted(paths)


def _foreign_tensors(form: Form, handle: Handle) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, adapter in handle.adapters.items():
        for name, tensor in form.tensors(adapter, view_at(handle, path)).items():
            found[form.key(path, name)] = tensor
        if adapter.common is not None:
            for name, tensor in form.shared(adapter.common).items():
                found[f"{SHARED_PREFIX}{name}"] = tensor
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}


def _whole(handle: Handle) -> list[str]:
    own = set(handle.own().paths)
    return [path for path in handle.paths if path not in own]


def _whole_tensors(handle: Handle, paths: list[str]) -> dict[str, Tensor]:
    adapters = {path: cast(WholeAdapter, handle.adapters[path]) for path in paths}
    return {
        f"{PREFIX}{path}.{name}": tensor.detach().cpu().clone().contiguous()
        for path, adapter in adapters.items()
        for name, tensor in values(adapter, view_at(handle, path)).items()
    }
