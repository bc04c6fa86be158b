"""A GGUF file like another, some of its tensors changed: metadata byte for byte, one tensor in memory at a time."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from addenda.bases import formats
from addenda.bases.gguf_header import METADATA_START, GGUFHeader, GGUFTensor, read_header
from addenda.bases.gguf_pack import DENSE_TYPES
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ExportError

__all__ = ["Changes", "pack", "read_tensor", "row_bytes", "set_number", "unpack", "write_like"]

_COUNT = 8
"""Where a file says how many tensors it has: after its mark and its version, a 64-bit number."""


class Changes:
    """Asked once for each tensor of the file, in its order; the base class changes nothing."""

    def tensors_of(self, header: GGUFHeader) -> tuple[GGUFTensor, ...]:
        """Return the tensors to write: the file's own, or others of its bytes beside them."""
        return header.tensors

    def type_of(self, tensor: GGUFTensor) -> str:
        """Return the format in which the tensor is written."""
        return tensor.type

    def rows_of(self, tensor: GGUFTensor) -> Tensor | None:
        """Return its raw rows in that format, uint8; None where its own are to be packed so, or copied."""
        return None


def write_like(
    origin: Path, target: Path, changes: Changes, *, on_progress: OnProgress | None = None
) -> None:
    """Write the file ``origin`` with some tensors changed; with none, the same bytes.

    Raises:
        ExportError: a row is not whole blocks of the format that it should be written in.
    """
    header = read_header(origin)
    tensors = changes.tensors_of(header)
    types = {tensor.name: changes.type_of(tensor) for tensor in tensors}
    with origin.open("rb") as old, target.open("wb") as new:
        before = bytearray(old.read(header.metadata_end))
        struct.pack_into("<Q", before, _COUNT, len(tensors))
        new.write(before)
        start = _write_table(new, tensors, types, header.alignment)
        total = sum(_bytes(tensor, types[tensor.name]) for tensor in tensors)
        for tensor in tensors:
            new.write(_data(old, tensor, types[tensor.name], changes.rows_of(tensor)))
            new.write(b"\0" * (-(new.tell() - start) % header.alignment))
            if on_progress:
                on_progress(Progress("write the GGUF file", new.tell() - start, total, "bytes"))


def set_number(path: Path, key: str, value: int) -> None:
    """Write another value for a 32-bit number of the metadata, where the file has that key."""
    header = read_header(path)
    name = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 4)
    with path.open("r+b") as file:
        file.seek(METADATA_START)
        place = file.read(header.metadata_end - METADATA_START).find(name)
        if place >= 0:
            file.seek(METADATA_START + place + len(name))
            file.write(struct.pack("<I", value))


def _write_table(
    file: BinaryIO, tensors: tuple[GGUFTensor, ...], types: Mapping[str, str], alignment: int
) -> int:
    """Write where each tensor lies and what it is; return where the first one begins."""
    offset = 0
    for tensor in tensors:
        name, kind = tensor.name.encode(), types[tensor.name]
        file.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)))
        file.write(b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape)))
        file.write(struct.pack("<IQ", int(gguf.GGMLQuantizationType[kind]), offset))
        size = _bytes(tensor, kind)
        offset += size + -size % alignment
    file.write(b"\0" * (-file.tell() % alignment))
    return file.tell()


def _bytes(tensor: GGUFTensor, kind: str) -> int:
    return tensor.elements // tensor.shape[-1] * row_bytes(kind, tensor.shape[-1], tensor.name)


def row_bytes(kind: str, columns: int, name: str) -> int:
    """Return the bytes of a row in a format of GGUF.

    Raises:
        ExportError: it is not whole blocks.
    """
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if columns % block:
        raise ExportError(
            f"'{name}' has rows of {columns:,} numbers, which are not whole blocks of {block} in {kind}",
            hint="take a type with smaller blocks, such as q8_0",
        )
    return columns // block * size


def _data(old: BinaryIO, tensor: GGUFTensor, kind: str, rows: Tensor | None) -> bytes:
    if rows is None:
        own = read_tensor(old, tensor)
        rows = own if kind == tensor.type else pack(unpack(own, tensor.type), kind, tensor.name)
    data = rows.contiguous().numpy().tobytes()
    if len(data) != _bytes(tensor, kind):
        raise ExportError(
            f"'{tensor.name}' would take {len(data):,} bytes as {kind}, not {_bytes(tensor, kind):,}",
            hint="report this with the command that was run",
        )
    return data


def read_tensor(file: BinaryIO, tensor: GGUFTensor) -> Tensor:
    """Return the raw rows of a tensor, uint8 (rows, bytes of a row)."""
    file.seek(tensor.start)
    raw = np.frombuffer(file.read(tensor.bytes), np.uint8)
    return torch.from_numpy(raw.copy()).view(-1, raw.size * tensor.shape[-1] // tensor.elements)


def unpack(rows: Tensor, kind: str) -> Tensor:
    """Return the numbers of raw rows, float32."""
    if kind in DENSE_TYPES:
        return rows.contiguous().view(getattr(torch, DENSE_TYPES[kind])).float()
    entry = formats.find(kind)
    if entry is not None and entry.block is not None:
        return entry.dequantize(rows.contiguous(), rows.shape[1] // entry.block_bytes * entry.block)
    return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]))


def pack(weight: Tensor, kind: str, name: str) -> Tensor:
    """Round a weight (rows, columns), or a vector, into a format of GGUF; returns raw rows, uint8.

    Raises:
        ExportError: its rows are not whole blocks, its numbers do not fit, or nothing here rounds to that format.
    """
    matrix = weight.detach().float().reshape(-1, weight.shape[-1]).cpu().contiguous()
    row_bytes(kind, matrix.shape[1], name)
    if kind in DENSE_TYPES:
        narrow = matrix.to(getattr(torch, DENSE_TYPES[kind]))
        if not bool(narrow.isfinite().all()):
            raise ExportError(f"'{name}' holds numbers that {kind} cannot", hint="take f32 or bf16")
        return narrow.view(torch.uint8)
    entry = formats.find(kind)
    if entry is None:
        raise ExportError(
            f"nothing here rounds to {kind}", hint=f"the formats are {', '.join(formats.names())}"
        )
    return entry.quantize(matrix)
