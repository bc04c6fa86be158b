"""A merge in the base's own packing: its folder again, with the adapted weights rounded as the others were."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from addenda.bases import LoadedBase
from addenda.bases.packed_layers import PackedLinear, packed_layers
from addenda.core.foreign import QuantizedView, is_quantized
from addenda.core.layers import kind_of, view_of
from addenda.core.merging import tied
from addenda.core.through import merged_rows
from addenda.errors import AddendaError, ExportError
from addenda.export.bitsandbytes import (
    own_format,
    packed_again,
    packed_as,
    quantizer_of,
    settings_for,
    tensors_of,
)
from addenda.export.careful import careful_rows
from addenda.export.job import Job
from addenda.export.rewriting import differences, read_tensor, rewrite, tensor_names

__all__ = ["AS_BASE", "CAREFUL", "audit_as_base", "own_form", "unpacked_form", "write_as_base"]

AS_BASE, CAREFUL = "base", "careful"
"""Adapted weights rounded as the base's are; and so that their outputs on calibration rows change least."""
_NAME = re.compile(r"(?P<stem>.*?)(?P<part>\.(weight(\..+)?|bias|SCB|weight_format))")
_ELSEWHERE = "take another --type of merged, such as bfloat16, or keep the adapter beside its base: --to peft"


def _why_not(base: LoadedBase | None) -> str | None:
    """Return why a merge cannot be packed as the base is; None where it can."""
    if base is None:
        return "a model that was not loaded from a folder has no packing that could be written again"
    if base.weights == "packed":
        return "the base's weights are packed as in its GGUF file, which '--to gguf --type base' writes again"
    library = quantizer_of(base.model)
    if base.weights == "dense" and library is None:
        return "the base's weights are not packed"
    if library not in {None, "bitsandbytes"}:
        return f"the base's weights are packed by {library}, which alone writes such"
    return None


def own_form(job: Job) -> Form:
    """Return what a merge makes of the base's tensors.

    Raises:
        ExportError: the base is not packed in a way that is written here, or its files have no place for a folded
            weight; all that stands against it.
    """
    if reason := _why_not(job.base):
        raise ExportError(f"'{job.type}' is no type for this merge: {reason}", hint=_ELSEWHERE)
    return _checked(Quantized(job) if quantizer_of(job.model) else PackedNow(job))


def unpacked_form(job: Job, dtype: torch.dtype) -> Form:
    """Return what a merge makes of the tensors of a base that bitsandbytes quantized where none is packed any more.

    Raises:
        ExportError: its files have no place for a folded weight; all that stands against it.
    """
    return _checked(Unpacked(job, dtype))


def _checked(form: Form) -> Form:
    if problems := [*form.problems()]:
        raise ExportError(
            f"the adapter cannot be folded into the base's files: {'; '.join(problems)}", hint=_ELSEWHERE
        )
    return form


class Form(ABC):
    """What becomes of the base's tensors.

    Args:
        job: the base, loaded from a folder, and its adapter.
        layers: paths of the layers whose tensors are written in another form than the files have.
    """

    def __init__(self, job: Job, layers: Iterable[str]) -> None:
        assert job.base is not None
        self.job, self.base, self.handle = job, job.base, job.handle
        self.layers = list(dict.fromkeys([*layers, *job.handle.paths]))
        names = tensor_names(self.base.folder)
        self._stems = {path: stem for path in self.layers if (stem := _stem_of(path, names)) is not None}
        self._paths = {stem: path for path, stem in self._stems.items()}

    @abstractmethod
    def weight(self, path: str, *, adapted: bool = True) -> Mapping[str, Tensor] | None:
        """Return the tensors of a layer's weight, by what follows the layer's name; None for those of the files."""

    @abstractmethod
    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return what is to be in ``config.json``, from what is in the base's."""

    def problems(self) -> Iterator[str]:
        """Yield what stands against folding the adapter into the base's files."""
        views = {path: self.handle.view(path) for path in self.handle.paths}
        shared = tied(self.base.model, {path: view for path, view in views.items() if view.writable})
        unable = [path for path in self.packed if self.careful and not self.careful_format(path)]
        if unable:
            yield f"a careful merge writes int8 and NF4 in blocks of 64, and '{unable[0]}' is in neither"
        yield from (f"'{path}' shares its weight with '{other}'" for path, other in shared.items())
        for path in self.layers:
            if path not in self._stems:
                yield f"they hold no '{path}.weight'"
            elif path in views and self.folded(path)[1] is not None and not views[path].has_bias:
                yield f"the architecture has no place for a bias at '{path}'"

    @property
    def packed(self) -> list[str]:
        """Paths of the adapted layers whose weight is packed."""
        return [path for path in self.handle.paths if not self.handle.view(path).writable]

    @property
    def careful(self) -> bool:
        """Whether adapted weights are rounded with care; what was trained through a rounding is exact without."""
        return self.job.type == CAREFUL and not self.handle.through

    def careful_format(self, path: str) -> str | None:
        """Return the format that a packed layer is rounded to with care; None where there is none that fits."""
        return None

    def folded(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Return a layer's weight and bias with the adapter, in float32 where it is packed."""
        view = self.handle.view(path)
        if view.writable:
            return self.handle.folded(path)
        with torch.no_grad():
            return self.handle.adapters[path].fold(view.exact_weight(), view.bias())

    def changes(self, path: str) -> bool:
        """Whether the adapter changes anything of a packed layer's weight."""
        return path in self.handle.paths and not torch.equal(
            self.folded(path)[0], self.handle.view(path).exact_weight()
        )

    def dense(self, path: str) -> Mapping[str, Tensor]:
        """Return the tensors of an adapted layer's weight that is not packed, in the dtype that the file has it in."""
        stored = read_tensor(self.base.folder, f"{self._stems[path]}.weight")
        return {".weight": self.folded(path)[0].to(stored.dtype)}

    def change(self, name: str) -> Mapping[str, Tensor] | None:
        """Return what stands in the place of a tensor of the files; see `rewriting.Change`."""
        stem, part = _split(name)
        path = self._paths.get(stem)
        if path is None:
            return None
        if part == ".bias":
            bias = self.folded(path)[1] if path in self.handle.paths else None
            return None if bias is None else {name: bias.to(read_tensor(self.base.folder, name).dtype)}
        made = self.weight(path)
        if made is None:
            return None
        return {stem + each: tensor for each, tensor in made.items()} if part == ".weight" else {}

    def own(self, name: str) -> Tensor:
        """Return a tensor as it is without the adapter."""
        stem, part = _split(name)
        path = self._paths.get(stem)
        made = None if path is None or part == ".bias" else self.weight(path, adapted=False)
        return read_tensor(self.base.folder, name) if made is None else made[part]

    def namesakes(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the same tensor of the other layers, as it is meant to be."""
        stem, part = _split(name)
        for path, other in self._stems.items():
            made = self.weight(path) if other != stem and part != ".bias" else None
            if made is not None and part in made:
                yield path, made[part]

    def layer_of(self, name: str) -> str | None:
        """Return the layer whose tensor in the files has a name."""
        return self._paths.get(_split(name)[0])


def _split(name: str) -> tuple[str, str]:
    found = _NAME.fullmatch(name)
    return (found["stem"], found["part"]) if found else (name, "")


def _stem_of(path: str, names: Iterable[str]) -> str | None:
    """How files name a layer: by its path, or with something before it."""
    wanted = f"{path}.weight"
    found = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    exact = wanted in found
    return path if exact else found[0].removesuffix(".weight") if len(found) == 1 else None


class PackedNow(Form):
    """Linear layers that were packed as NF4 or INT8 when the base was loaded, as bitsandbytes keeps such."""

    def __init__(self, job: Job) -> None:
        assert job.base is not None
        self._packed = {
            path: layer
            for path, layer in packed_layers(job.base.model).items()
            if isinstance(layer, PackedLinear)
        }
        super().__init__(job, self._packed)

    def weight(self, path: str, *, adapted: bool = True) -> Mapping[str, Tensor] | None:
        layer = self._packed.get(path)
        if layer is None:
            return self.dense(path) if adapted else None
        raw = layer.raw
        if adapted and self.changes(path):
            name = layer.weight_format.name
            raw = (
                careful_rows(self.job, name, path, self.packed)
                if self.careful
                else merged_rows(self.handle, path, name)
            )
        return tensors_of(raw, layer.weight_format, layer.width)

    def careful_format(self, path: str) -> str | None:
        return self._packed[path].weight_format.name

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        entry = next(iter(self._packed.values())).weight_format
        kept = [
            path
            for path, module in self.base.model.named_modules()
            if (kind := kind_of(module))
            and kind.linear
            and path not in self._packed
            and ".adapters." not in path
        ]
        # float16 is computed in float32, as when the base was loaded.
        bfloat16 = "bfloat16" in {config.get("dtype"), config.get("torch_dtype")}
        computed = "bfloat16" if bfloat16 else "float32"
        return {**config, "quantization_config": settings_for(entry, kept, computed)}


class Quantized(Form):
    """Layers that bitsandbytes quantized, in the layout that each of them has."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, ())

    def weight(self, path: str, *, adapted: bool = True) -> Mapping[str, Tensor] | None:
        if not adapted:
            return None
        view = self.handle.view(path)
        if not isinstance(view, QuantizedView):
            return self.dense(path)
        if not self.changes(path):
            return None
        if self.careful:
            name = str(self.careful_format(path))
            return packed_as(view.module, careful_rows(self.job, name, path, self.packed))
        return packed_again(view.module, self.folded(path)[0])

    def careful_format(self, path: str) -> str | None:
        return own_format(self.handle.view(path).module)

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        return config


class Unpacked(Form):
    """Layers that bitsandbytes quantized, as numbers."""

    def __init__(self, job: Job, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._quantized = {path: each for path, each in job.model.named_modules() if is_quantized(each)}
        super().__init__(job, self._quantized)

    def weight(self, path: str, *, adapted: bool = True) -> Mapping[str, Tensor] | None:
        if adapted and path in self.handle.paths:
            weight = self.folded(path)[0]
        elif path in self._quantized:
            weight = view_of(self._quantized[path], path).exact_weight()
        else:
            return None
        return {".weight": weight.to(self._dtype)}

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        kept = {
            key: value for key, value in config.items() if key not in {"quantization_config", "torch_dtype"}
        }
        return {**kept, "dtype": str(self._dtype).removeprefix("torch.")}


# --------------------------------------------------------------------------------------------- writing, reading back


def write_as_base(job: Job, form: Form, folder: Path) -> None:
    """Write the base's folder with the adapter folded in, tokenizer and template too; one tensor after another."""
    assert job.base is not None
    for done, _ in enumerate(rewrite(job.base.folder, folder, form.change, form.settings), start=1):
        job.say("write the merged weights", done, done, "files")
    job.base.tokenizer.save_pretrained(folder)


def audit_as_base(form: Form, folder: Path) -> list[str]:
    """Return which tensors and settings of a written folder are not what was meant."""
    source = form.base.folder
    try:
        wrong = [_told(form, *each) for each in differences(source, folder, form.change)]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (AddendaError, OSError, SafetensorError, ValueError) as problem:
        return [f"it cannot be read back: {problem}"]
    wanted = form.settings(json.loads((source / "config.json").read_text(encoding="utf-8")))
    keys = sorted(key for key in {**wanted, **config} if wanted.get(key) != config.get(key))
    return wrong + [
        f"config.json says {config.get(key)!r} of '{key}', not {wanted.get(key)!r}" for key in keys
    ]


def _told(form: Form, name: str, wanted: Tensor | None, found: Tensor | None) -> str:
    if wanted is None:
        return f"tensor '{name}' is there and should not be"
    if found is None:
        return f"tensor '{name}' is missing"
    if name.rpartition(".")[2].startswith("bitsandbytes__"):
        return f"'{name}' says {_text(found)}, not {_text(wanted)}"
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"'{name}' is {_form(found)}, not {_form(wanted)}"
    path = form.layer_of(name)
    if path is not None and torch.equal(form.own(name), found):
        return f"'{name}' is the base's own, without the adapter"
    if path is not None:
        for other, tensor in form.namesakes(name):
            if tensor.shape == found.shape and torch.equal(tensor, found):
                return f"'{name}' holds what belongs to '{other}'"
    share = float((found != wanted).float().mean())
    return f"'{name}' is not as it was rounded at {share:.1%} of its numbers"


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode(errors="replace")
