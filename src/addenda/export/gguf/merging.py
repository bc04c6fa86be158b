"""The base's GGUF file with an adapter folded into its tensors, and the reading back of one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import gguf
import torch
from torch import Tensor

from addenda.bases import formats
from addenda.bases.gguf_header import METADATA_START, GGUFHeader, GGUFTensor, read_header
from addenda.bases.gguf_pack import DENSE_TYPES
from addenda.bases.gguf_ways import Stack, Way
from addenda.core.handle import Handle
from addenda.core.through import merged_rows
from addenda.errors import AddendaError
from addenda.export.careful import careful_rows, widened
from addenda.export.ends import tied_ends
from addenda.export.gguf.copying import Changes, pack, read_tensor, set_number, unpack, write_like
from addenda.export.gguf.origin import Origin, dense, parted
from addenda.export.gguf.told import what_is_wrong
from addenda.export.job import Job

__all__ = ["AS_BASE", "CAREFUL", "ROOMY", "TYPES", "WIDE", "Merged", "audit_merged", "write_merged_gguf"]

AS_BASE, WIDE, CAREFUL, ROOMY = "base", "base+q8_0", "careful", "careful+q8_0"
_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q6_k": "MOSTLY_Q6_K",
    "q5_k": "MOSTLY_Q5_K_S", "q5_1": "MOSTLY_Q5_1", "q5_0": "MOSTLY_Q5_0", "q4_k": "MOSTLY_Q4_K_S",
    "q4_1": "MOSTLY_Q4_1", "q4_0": "MOSTLY_Q4_0", "iq4_nl": "MOSTLY_IQ4_NL", "iq4_xs": "MOSTLY_IQ4_XS",
    "q3_k": "MOSTLY_Q3_K_S", "q2_k": "MOSTLY_Q2_K_S",
}  # fmt: skip
"""What llama.cpp calls a file whose matrices are of a type."""
TYPES = (AS_BASE, WIDE, CAREFUL, ROOMY, *_FILE_TYPES)
"""``base``: every tensor as it is in the base's file. ``base+q8_0``: likewise, but the adapted ones in Q8_0.
``careful``: as in the base's file, the adapted ones rounded so that their outputs on calibration rows change least.
``careful+q8_0``: likewise, but those that lose most for each byte more in Q8_0, up to a tenth of the file.
Others: all matrices in that type, those whose rows are not whole blocks of it in Q8_0 or F16."""
_FALLBACKS = ("Q8_0", "F16")


class Merged(Changes):
    """The tensors of a base with an adapter folded in.

    Args:
        job: the model and its adapter.
        origin: the base's GGUF file.
        kind: one of `TYPES`.
    """

    def __init__(self, job: Job, origin: Origin, kind: str) -> None:
        self._job, self._origin, self._kind = job, origin, kind
        paths = set(job.handle.paths)
        self.adapted = {origin.way(path).tensor: path for path in paths - origin.experts}
        self.stacks = {
            name: stack for name, stack in origin.stacks.items() if paths & set(origin.paths(stack))
        }
        """Those with an adapter on some expert."""
        self._wide = _widened(job, origin) if kind == ROOMY else frozenset()

    def tensors_of(self, header: GGUFHeader) -> tuple[GGUFTensor, ...]:
        return self._origin.header.tensors

    def type_of(self, tensor: GGUFTensor) -> str:
        if self.adapted.get(tensor.name) in self._wide:
            return "Q8_0"
        if self._kind in {AS_BASE, CAREFUL, ROOMY} or len(tensor.shape) < 2:
            return tensor.type
        if self._kind == WIDE:
            changed = tensor.name in self.adapted or tensor.name in self.stacks
            return _fitting("Q8_0", tensor) if changed else tensor.type
        return _fitting(self._kind.upper(), tensor)

    def rows_of(self, tensor: GGUFTensor) -> Tensor | None:
        kind = self.type_of(tensor)
        if tensor.name in self.stacks:
            return self._experts(self.stacks[tensor.name], tensor, kind)
        parameter = self._origin.parameters.get(tensor.name)
        path = self.adapted.get(tensor.name)
        if path is None:
            path = self._with_bias(parameter)
        if path is not None and parameter is not None:
            return self._folded(path, parameter, tensor, kind)
        if kind == tensor.type:
            return None  # the file's own numbers, which the model in memory may have rounded
        weight = self._origin.weight(self._job.model, tensor.name)
        return None if weight is None else pack(weight, kind, tensor.name)

    def _with_bias(self, parameter: str | None) -> str | None:
        """The adapted layer whose bias this is."""
        path, _, last = (parameter or "").rpartition(".")
        return path if last == "bias" and path in self._job.handle.paths else None

    def _folded(self, path: str, parameter: str, tensor: GGUFTensor, kind: str) -> Tensor | None:
        way, is_weight = self._origin.ways[parameter], parameter.endswith(".weight")
        weight, bias = self._job.handle.folded(path)
        changed = weight if is_weight else bias
        assert changed is not None
        if kind == tensor.type and torch.equal(changed, dense(self._job.model, parameter).to(changed.dtype)):
            return None  # the adapter changes nothing here, and its rounding would
        by_rows = self._job.handle.view(path).pointwise  # an embedding's matrix lies the other way
        if is_weight and by_rows and kind not in DENSE_TYPES and formats.find(kind) and not way.offset:
            return way.back(self._rounded(path, kind))
        return pack(way.back(changed.float()), kind, tensor.name)

    def _experts(self, stack: Stack, tensor: GGUFTensor, kind: str) -> Tensor:
        """The raw rows of all experts; of those without an adapter the file's own, if they are in that format."""
        weight = self._origin.weight(self._job.model, tensor.name)
        assert weight is not None
        with self._origin.path.open("rb") as file:
            own = read_tensor(file, tensor).chunk(len(weight)) if kind == tensor.type else None
        made = []
        for expert, path in enumerate(self._origin.paths(stack)):
            rows = None
            if path in self._job.handle.paths:
                rows = self._expert(path, stack, weight[expert], tensor, kind)
            if rows is None:
                rows = own[expert] if own else pack(weight[expert], kind, tensor.name)
            made.append(rows)
        return torch.cat(made)

    def _expert(self, path: str, stack: Stack, bare: Tensor, tensor: GGUFTensor, kind: str) -> Tensor | None:
        changed = self._job.handle.folded(path)[0][stack.rows]
        if kind == tensor.type and torch.equal(changed, bare.to(changed.dtype)):
            return None
        if kind not in DENSE_TYPES and formats.find(kind):
            return self._rounded(path, kind)[stack.rows]
        return pack(changed.float(), kind, tensor.name)

    def _rounded(self, path: str, kind: str) -> Tensor:
        """The raw rows of a folded layer, in the model's order."""
        job = self._job
        plain = self._kind not in {CAREFUL, ROOMY} or path in self._wide
        if plain or not formats.get(kind).grid or job.handle.through:
            return merged_rows(job.handle, path, kind)
        return careful_rows(job, kind, path)


def _widened(job: Job, origin: Origin) -> frozenset[str]:
    """The layers that `ROOMY` keeps at Q8_0; found out once. Experts, many of which are one tensor, are left alone."""
    if ROOMY not in job.kept:
        kinds = {
            path: origin.tensors[origin.way(path).tensor].type
            for path in job.handle.paths
            if path not in origin.experts and job.handle.view(path).pointwise
        }
        # Blocks of 32, as those of Q8_0.
        fitting = {path: kind for path, kind in kinds.items() if (each := formats.find(kind)) and each.grid}
        job.kept[ROOMY] = widened(job, fitting, origin.path.stat().st_size)
    found: frozenset[str] = job.kept[ROOMY]
    return found


def _fitting(kind: str, tensor: GGUFTensor) -> str:
    for each in (kind, *_FALLBACKS):
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[each]]
        if tensor.shape[-1] % block == 0:
            return each
    return "F32"


def write_merged_gguf(job: Job, origin: Origin, target: Path, kind: str) -> None:
    """Write the base with the adapter folded in; with one that changes nothing, and ``base``, the same bytes.

    An embedding and an output head that share a weight get a tensor each where the adapter stands on one of them.

    Raises:
        ExportError: a folded layer has no tensor in the file.
        MethodError: the method has no such weight.
    """
    origin = _with_ends(job, origin)
    require_places(job.handle, origin)
    write_like(origin.path, target, Merged(job, origin, kind), on_progress=job.on_progress)
    if kind in _FILE_TYPES:
        set_number(target, "general.file_type", int(gguf.LlamaFileType[_FILE_TYPES[kind]]))


def _with_ends(job: Job, origin: Origin) -> Origin:
    return parted(origin, job.model) if tied_ends(job.handle.paths, job.model) else origin


def require_places(handle: Handle, origin: Origin) -> None:
    """Refuse an adapter that folds into a tensor which the file does not have."""
    for path in handle.paths:
        if path not in origin.experts:
            origin.way(path)
        if handle.folded(path)[1] is not None:
            origin.way(path, "bias")


# ---------------------------------------------------------------------------------------------------- reading back


def audit_merged(job: Job, origin: Origin, file: Path, kind: str) -> list[str]:
    """Read a merged file back: what of its metadata and its tensors is not what was meant."""
    origin = _with_ends(job, origin)
    try:
        header = read_header(file)
    except AddendaError as error:
        return [error.message]
    return [*_metadata(origin, header, file), *_tensors(job, origin, header, file, kind)]


def _metadata(origin: Origin, header: GGUFHeader, file: Path) -> Iterator[str]:
    own, found = origin.header.metadata, header.metadata
    keys = [key for key in {**own, **found} if key != "general.file_type" and own.get(key) != found.get(key)]
    yield from (f"'{key}' is {_short(found.get(key))}, in the base {_short(own.get(key))}" for key in keys)
    if not keys and _bytes(origin.path, origin.header) != _bytes(file, header):
        yield "a list of the tokenizer's differs from the base's"


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _bytes(path: Path, header: GGUFHeader) -> bytes:
    """The metadata as written, without the number that says how the file is packed."""
    with path.open("rb") as file:
        data = file.read(header.metadata_end)[METADATA_START:]
    key = b"general.file_type"
    at = data.find(key)
    return data if at < 0 else data[:at] + data[at + len(key) + 8 :]


def _tensors(job: Job, origin: Origin, header: GGUFHeader, file: Path, kind: str) -> Iterator[str]:
    changes = Merged(job, origin, kind)
    there = {tensor.name: tensor for tensor in header.tensors}
    yield from (f"tensor '{name}' is missing" for name in origin.tensors if name not in there)
    yield from (f"tensor '{name}' is there and should not be" for name in there if name not in origin.tensors)
    with file.open("rb") as opened, origin.path.open("rb") as base:
        for name, tensor in origin.tensors.items():
            if name not in there:
                continue
            wanted = changes.type_of(tensor)
            if there[name].type != wanted:
                yield f"tensor '{name}' is in {there[name].type}, not in {wanted}"
                continue
            rows, own = changes.rows_of(tensor), functools.partial(read_tensor, base, tensor)
            if rows is None:
                rows = own() if wanted == tensor.type else pack(unpack(own(), tensor.type), wanted, name)
            found = read_tensor(opened, there[name])
            if not torch.equal(rows.reshape(-1), found.reshape(-1)):
                yield f"'{name}' {_told(changes, origin, tensor, rows, found, base)}"


def _told(  # noqa: PLR0917  (one tensor as meant and as found, and what else there is)
    changes: Merged, origin: Origin, tensor: GGUFTensor, rows: Tensor, found: Tensor, base: BinaryIO
) -> str:
    name, kind = tensor.name, changes.type_of(tensor)
    own = read_tensor(base, tensor)
    adapted = name in changes.adapted or name in changes.stacks
    if adapted and torch.equal(own.reshape(-1), found.reshape(-1)):
        return "is the base's own, without the adapter"
    for other in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16"):
        again = pack(unpack(pack(unpack(rows, kind), other, name), other), kind, name)
        if other != kind and torch.equal(again.reshape(-1), found.reshape(-1)):
            return f"was rounded to {other} on the way"
    for twin in origin.tensors.values():
        if twin.name != name and twin.shape == tensor.shape and changes.type_of(twin) == kind:
            theirs = changes.rows_of(twin)
            if torch.equal(read_tensor(base, twin) if theirs is None else theirs, found):
                return f"holds what belongs to '{twin.name}'"
    if name in origin.stacks:
        return _told_of_experts(tensor, rows, found, own, kind)
    parameter = origin.parameters.get(name)
    way = origin.ways[parameter] if parameter else Way(name, None)
    meant, came = (way.there(unpack(each, kind).reshape(tensor.shape)) for each in (rows, found))
    return what_is_wrong(name, {name: meant}, came, way.order)


def _told_of_experts(tensor: GGUFTensor, rows: Tensor, found: Tensor, own: Tensor, kind: str) -> str:
    """What became of the first expert in a stack that is not the one meant."""
    count = tensor.shape[0]
    meant, came, bare = (each.reshape(-1, each.shape[-1]).chunk(count) for each in (rows, found, own))
    wrong = next(expert for expert in range(count) if not torch.equal(meant[expert], came[expert]))
    for other in range(count):
        if other != wrong and torch.equal(meant[other], came[wrong]):
            return f"holds in place of expert {wrong} what belongs to expert {other}"
    if torch.equal(bare[wrong], came[wrong]):
        return f"holds expert {wrong} as the base has it, without the adapter"
    name = f"{tensor.name} {wrong}"
    told = what_is_wrong(name, {name: unpack(meant[wrong], kind)}, unpack(came[wrong], kind), None)
    return f"holds an expert, number {wrong}, that {told}"
