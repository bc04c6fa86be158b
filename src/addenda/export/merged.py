"""A merged model: the adapter folded into the base's weights, as a model folder that transformers loads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.model_config import quiet_transformers
from addenda.bases.packed_layers import packed_layers
from addenda.core.handle import Handle
from addenda.core.host import adapter_prefixes
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ExportError
from addenda.export.ends import ends_of, tied_ends, untied
from addenda.export.own import OwnTensors

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

    The weights are folded in float32 and rounded once to ``dtype``. Packed ones are unpacked. An embedding and an
    output head that share a weight get one each where the adapter stands on one of them. The model in memory stays as
    it was.

    Args:
        base: the loaded base, best in float32, carrying the adapter.
        handle: the adapter.
        folder: an empty folder.
        dtype: of the written weights.
        adapted: False writes the base alone.
        on_progress: told of the steps.

    Raises:
        MethodError: the method cannot be merged, or a weight is shared otherwise with another layer.
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
    ends = tied_ends(handle.paths, base.model) if adapted else []
    with untied(base.model) if ends else contextlib.nullcontext():
        if base.weights == "dense" and adapted:
            _merge_and_write(base, handle, ends, work, dtype)
        else:
            _save(base, _unpacked_state(base, handle, handle.paths if adapted else []), work, dtype)
    config = work / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(base: LoadedBase, state: Mapping[str, Tensor], work: Path, dtype: torch.dtype) -> None:
    stored = base.model.config.dtype
    try:
        with quiet_transformers():
            base.model.save_pretrained(work, state_dict=_rounded(state, dtype))
    finally:  # else the configuration in memory says what the numbers were widened to
        base.model.config.dtype = stored


def _merge_and_write(
    base: LoadedBase, handle: Handle, ends: Sequence[str], work: Path, dtype: torch.dtype
) -> None:
    """Merge, write, and take the adapter out again; tied ends, whose one weight holds no two, are folded aside."""
    before = _own_state(base.model)
    inner = handle.without(ends)
    if inner.paths:
        inner.merge()
    try:
        state = _own_state(base.model)
        _require_place(base, [key for key in state if key not in before])
        for path in ends:
            state |= _folded(base, handle, path, state)
        _save(base, state, work, dtype)
    finally:
        if inner.paths:
            inner.unmerge()


def _folded(base: LoadedBase, handle: Handle, path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer with the adapter folded in."""
    weight, bias = handle.folded(path)
    if bias is None:
        return {f"{path}.weight": weight}
    _require_place(base, [f"{path}.bias"] if f"{path}.bias" not in state else [])
    return {f"{path}.weight": weight, f"{path}.bias": bias}


def _require_place(base: LoadedBase, new: list[str]) -> None:
    if new:
        raise ExportError(
            f"merging gives {type(base.model).__name__} {len(new)} weights it has no place for, first '{new[0]}'",
            hint="the architecture has no biases there; keep the adapter beside its base",
        )


def _unpacked_state(base: LoadedBase, handle: Handle, paths: Sequence[str]) -> dict[str, Tensor]:
    """The dense model's tensors: packed weights unpacked, the adapter folded into those at ``paths``."""
    layers, state = packed_layers(base.model), _own_state(base.model)
    made = {key: tensor for key, tensor in state.items() if key.removesuffix(".raw") not in layers}
    unpacked: dict[int, Tensor] = {}
    for path, layer in layers.items():
        place = layer.raw.data_ptr()
        if place not in unpacked:
            unpacked[place] = layer.dequantized()
        made[f"{path}.weight"] = unpacked[place]
    for path in paths:
        made |= _folded(base, handle, path, made)
    return made


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, without those of any adapter."""
    inside = adapter_prefixes(model)
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}


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


def _wrong_ends(handle: Handle, folder: Path, files: Mapping[str, Any], dtype: torch.dtype) -> Iterator[str]:
    """Yield what is wrong with an embedding and an output head that share a weight in the base."""
    model: Any = handle.model
    ends = ends_of(model)
    if not ends:
        return
    parted = tied_ends(handle.paths, model)
    told = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    if told is bool(parted):
        yield f"config.json says tie_word_embeddings is {told}"
    there = [path for path in ends if f"{path}.weight" in files]
    if not parted:
        yield from (f"'{ends[1]}.weight' is there and should not be" for _ in range(len(there) > 1))
        return
    yield from (f"'{path}.weight' is missing" for path in ends if path not in there)
    bare = OwnTensors(model)[f"{ends[0]}.weight"].to(dtype)
    for path in there:
        if path not in parted and not torch.equal(files[f"{path}.weight"].get_tensor(f"{path}.weight"), bare):
            yield f"'{path}' does not hold the base's weight"


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
    wrong = list(_wrong_ends(handle, folder, files, dtype))
    for path, name in names.items():
        wanted = handle.folded(path)[0].to(dtype)
        if not torch.equal(files[name].get_tensor(name), wanted.cpu()):
            owner = next(
                (o for o, key in names.items() if torch.equal(files[key].get_tensor(key), wanted)), None
            )
            where = f"; '{owner}' holds them" if owner else ""
            wrong.append(f"'{path}' does not hold its weights with the adapter folded in{where}")
    return wrong
