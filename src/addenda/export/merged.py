"""A merged model: the adapter folded into the base's weights, as a model folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from addenda.bases import LoadedBase
from addenda.bases.model_config import quiet_transformers
from addenda.bases.packed_layers import PackedEmbedding, PackedLinear, packed_layers
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ExportError

__all__ = ["merged_audit", "write_merged"]


def write_merged(
    base: LoadedBase,
    handle: Handle,
    folder: Path,
    dtype: torch.dtype,
    *,
    adapted: bool = True,
    on_progress: OnProgress | None = None,
) -> None:
    """Write base and adapter as one model folder: safetensors, configuration, tokenizer and chat template.

    The weights are folded in float32 and rounded once to ``dtype``. Packed ones are unpacked. The model in memory
    stays as it was.

    Args:
        base: the loaded base, best in float32, carrying the adapter.
        handle: the adapter.
        folder: an empty folder.
        dtype: of the written weights.
        adapted: False writes the base alone.
        on_progress: told of the steps.

    Raises:
        MethodError: the method cannot be merged, or a weight is shared with another layer.
        ExportError: the architecture has no place for a merged weight.
    """
    _say(on_progress, 0)
    _write_weights(base, handle, folder, dtype, adapted=adapted)
    _say(on_progress, 1)
    base.tokenizer.save_pretrained(folder)


def _say(on_progress: OnProgress | None, done: int) -> None:
    if on_progress:
        on_progress(Progress("write the merged weights", done, 1, "models"))


def _write_weights(
    base: LoadedBase, handle: Handle, work: Path, dtype: torch.dtype, *, adapted: bool
) -> None:
    if base.weights == "dense" and adapted:
        _merge_and_write(base, handle, work, dtype)
    else:
        _save(base, _rounded(_unpacked_state(base, handle, handle.paths if adapted else []), dtype), work)
    config = work / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(base: LoadedBase, state: dict[str, Tensor], work: Path) -> None:
    stored = base.model.config.dtype
    try:
        with quiet_transformers():
            base.model.save_pretrained(work, state_dict=state)
    finally:
        base.model.config.dtype = (
            stored  # else the configuration in memory says what the numbers were widened to
        )


def _merge_and_write(base: LoadedBase, handle: Handle, work: Path, dtype: torch.dtype) -> None:
    before = _own_keys(base.model.state_dict(), handle)
    handle.merge()
    try:
        state = base.model.state_dict()
        keys = _own_keys(state, handle)
        new = [key for key in keys if key not in set(before)]
        _require_place(base, new)
        _save(base, _rounded({key: state[key] for key in keys}, dtype), work)
    finally:
        handle.unmerge()


def _require_place(base: LoadedBase, new: list[str]) -> None:
    if new:
        raise ExportError(
            f"merging gives {type(base.model).__name__} {len(new)} weights it has no place for, first '{new[0]}'",
            hint="the architecture has no biases there; keep the adapter beside its base",
        )


def _unpacked_state(base: LoadedBase, handle: Handle, paths: Sequence[str]) -> dict[str, Tensor]:
    """The dense model's tensors: packed weights unpacked, the adapter folded into those at ``paths``."""
    layers, state = packed_layers(base.model), base.model.state_dict()
    made = {key: state[key] for key in _own_keys(state, handle) if key.removesuffix(".raw") not in layers}
    unpacked: dict[int, Tensor] = {}
    for path, layer in layers.items():
        place = layer.raw.data_ptr()
        if place not in unpacked:
            unpacked[place] = layer.dequantized()
        made[f"{path}.weight"] = unpacked[place]
    for path in paths:
        _require_own(path, layers)
        weight, bias = handle.folded(path)
        _require_place(base, [f"{path}.bias"] if bias is not None and f"{path}.bias" not in made else [])
        made[f"{path}.weight"] = weight
        if bias is not None:
            made[f"{path}.bias"] = bias
    return made


def _require_own(path: str, layers: Mapping[str, PackedLinear | PackedEmbedding]) -> None:
    """Refuse to fold into bytes that another layer shares."""
    own = layers[path].raw.data_ptr() if path in layers else None
    shared = [other for other, layer in layers.items() if other != path and layer.raw.data_ptr() == own]
    if shared:
        raise ExportError(
            f"merging would also change a layer that shares its weight: '{path}' with '{shared[0]}'",
            hint="keep the adapter beside its base: --to peft",
        )


def _own_keys(state: Mapping[str, Tensor], handle: Handle) -> list[str]:
    """The base's own tensors, without those of any adapter."""
    inside = tuple(f"{path}.adapters." for path in handle.paths)
    return [key for key in state if not key.startswith(inside)]


def _rounded(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Round floating tensors to ``dtype``; tensors that share memory go on sharing it, so that ties are kept."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    rounded = {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in made:
            made[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        rounded[key] = made[place]
    return rounded


def merged_audit(handle: Handle, folder: Path, dtype: torch.dtype) -> list[str]:
    """Return which layers of a written model hold other weights than those with the adapter folded in."""
    try:
        files = {
            key: file
            for path in sorted(folder.glob("*.safetensors"))
            for file in [safe_open(path, framework="pt")]
            for key in file.keys()  # noqa: SIM118  (it is no mapping)
        }
    except (OSError, SafetensorError) as problem:
        return [f"the weights cannot be read: {problem}"]
    names = {path: f"{path}.weight" for path in handle.paths if f"{path}.weight" in files}
    wrong = []
    for path, name in names.items():
        wanted = handle.folded(path)[0].to(dtype)
        if not torch.equal(files[name].get_tensor(name), wanted.cpu()):
            owner = next(
                (o for o, key in names.items() if torch.equal(files[key].get_tensor(key), wanted)), None
            )
            where = f"; '{owner}' holds them" if owner else ""
            wrong.append(f"'{path}' does not hold its weights with the adapter folded in{where}")
    return wrong
