"""A merged model: the adapter folded into the base's weights, as a model folder that transformers loads."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.saving import alone, keeps_names, write_settings, write_whole
from addenda.core.handle import Handle
from addenda.core.merging import tied
from addenda.core.parts import Place
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ExportError
from addenda.export.ends import ends_of, tied_ends, untied
from addenda.export.own import OwnTensors
from addenda.export.tensor_file import TensorFile

__all__ = ["merged_audit", "write_merged"]

_WEIGHTS = "model.safetensors"


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

    The weights are folded in float32 and rounded once to ``dtype``, one after another; an architecture whose files
    group them otherwise than the model does, such as experts, needs all at once. Packed ones are unpacked. An embedding
    and an output head that share a weight get one each where the adapter stands on one of them. The model in memory
    stays as it was.

    Args:
        base: the loaded base, best in float32, carrying the adapter.
        handle: the adapter.
        folder: an empty folder.
        dtype: of the written weights.
        adapted: False writes the base alone.
        on_progress: told of the steps.

    Raises:
        ExportError: the method cannot be merged, a weight is shared otherwise with another layer, or the architecture
            has no place for a bias.
        MethodError: a folded value is not finite.
    """
    if adapted and not handle.method.mergeable:
        raise ExportError(
            f"method '{handle.method.name}' cannot be merged",
            hint="keep the adapter beside its base: --to peft",
        )
    say = _told(on_progress)
    ends = tied_ends(handle.paths, base.model) if adapted else []
    merged = _Merged(base.model, handle if adapted else None)
    _require_apart(handle, [path for path in handle.paths if path not in ends] if adapted else [])
    parted = [f"{path}.weight" for path in ends_of(base.model) or () if ends]
    with untied(base.model) if ends else contextlib.nullcontext():
        names = {*alone(base.model, merged.kept), *parted}
        wanted = [name for name in merged if name in names]
        if keeps_names(base.model, {name: merged.kept[name] for name in wanted}):
            write_settings(base.model, folder)
            _stream(merged, wanted, dtype, folder / _WEIGHTS, say)
        else:
            say(0, 1)
            write_whole(base.model, folder, {name: _rounded(merged[name], dtype) for name in wanted})
            say(1, 1)
    _tell_dtype(folder / "config.json", dtype)
    base.tokenizer.save_pretrained(folder)


Say = Callable[[int, int], None]


def _told(on_progress: OnProgress | None) -> Say:
    def say(done: int, total: int) -> None:
        if on_progress:
            on_progress(Progress("write the merged weights", done, total, "tensors"))

    return say


def _require_apart(handle: Handle, paths: Sequence[str]) -> None:
    shared = tied(handle.model, {path: handle.view(path) for path in paths})
    if shared:
        path, other = next(iter(shared.items()))
        raise ExportError(
            f"merging would also change a layer that shares its weight: '{path}' with '{other}'",
            hint="keep the adapter beside its base: --to peft",
        )


def _stream(
    tensors: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype, path: Path, say: Say
) -> None:
    with TensorFile(path, names=sum(len(json.dumps(name)) for name in names), count=len(names)) as file:
        for done, name in enumerate(names):
            say(done, len(names))
            file.add(name, _rounded(tensors[name], dtype))
    say(len(names), len(names))


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _tell_dtype(config: Path, dtype: torch.dtype) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Merged(OwnTensors):
    """A model's tensors with an adapter folded in, each made when it is asked for."""

    def __init__(self, model: nn.Module, handle: Handle | None) -> None:
        super().__init__(model)
        self._changes: dict[str, list[tuple[str, int, Place]]] = {}
        if handle is None:
            return
        self._folded = functools.lru_cache(maxsize=1)(handle.folded)  # weight and bias are asked for in turn
        owners = {id(module): path for path, module in model.named_modules()}
        for path in handle.paths:
            view = handle.view(path)
            for number, place in enumerate((view.weight_place(), view.bias_place())):
                if place is not None:
                    name = f"{owners[id(place.module)]}.{place.name}"
                    self._changes.setdefault(name, []).append((path, number, place))
        self._with_bias = {p for name in self for p, number, _ in self._changes.get(name, ()) if number == 1}

    def __getitem__(self, name: str) -> Tensor:
        whole = None
        for path, number, place in self._changes.get(name, ()):
            found = self._folded(path)
            if found[1] is not None and path not in self._with_bias:
                raise ExportError(
                    f"merging gives '{path}' a bias that the architecture has no place for",
                    hint="keep the adapter beside its base: --to peft",
                )
            if (part := found[number]) is not None:
                whole = place.into(whole, part)
        return super().__getitem__(name) if whole is None else whole


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
        if len(there) > 1:
            yield f"'{ends[1]}.weight' is there and should not be"
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
