"""Read the header of a GGUF file that a stranger wrote, within stated bounds.

Every count is compared with a limit and every extent with the file's length before anything is allocated or read,
in Python integers, which do not overflow. No tensor data is touched. Only a file that passes here is shown to the
libraries that convert it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.errors import BaseModelError, UnsafeError

__all__ = ["Array", "GGUFHeader", "GGUFTensor", "read_header"]

MAX_TENSORS = 65_536
MAX_KEYS = 4_096
MAX_STRING = 2**20
"""Bytes of one string."""
MAX_ITEMS = 16_000_000
"""Items of one array."""
MAX_NAME = 256
"""Bytes of a key or a tensor name; the format allows 64 for names and keys of 65,535."""
MAX_DIMENSIONS = 4
METADATA_START = 24
"""Before it: magic number, version, and how many tensors and keys there are."""

_MAGIC = b"GGUF"
_DAMAGED = "fetch the file again, and compare its SHA-256 with the one its source states"
_REFUSED = "no sound model looks like this: do not use the file unless you know who made it"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_BOOL = 7


@dataclass(frozen=True)
class Array:
    """An array that was measured but not kept."""

    length: int
    """Number of items."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]
    """Dimensions as PyTorch orders them, outermost first."""
    type: str
    """Weight format, e.g. ``Q4_1``."""
    start: int
    """First byte in the file."""
    bytes: int
    """Bytes in the file."""

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata and the tensor table of a GGUF file."""

    version: int
    metadata: dict[str, Any]
    """Scalars and strings by key; an array is kept only as its `Array` length."""
    tensors: tuple[GGUFTensor, ...]
    metadata_end: int = 0
    """First byte after the metadata, which begins at byte `METADATA_START`."""

    @property
    def alignment(self) -> int:
        """Of which number of bytes each tensor's place is a multiple."""
        return int(self.metadata.get("general.alignment", 32))

    @property
    def architecture(self) -> str:
        """The model family, e.g. ``llama``."""
        return str(self.metadata["general.architecture"])

    @property
    def elements(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    def formats(self) -> dict[str, int]:
        """Number of tensors per weight format, most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of the GGUF file at ``path``.

    Raises:
        BaseModelError: the file is no GGUF file, is cut short, or contradicts itself.
        UnsafeError: it claims sizes past the bounds, or data outside itself. Both name the byte.
    """
    size = path.stat().st_size
    if size < METADATA_START:
        raise BaseModelError(
            "not a GGUF file: shorter than its header", where={"file": path, "bytes": size}, hint=_DAMAGED
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data, path).header()


class _Reader:
    """A cursor over the mapped file: every step is bounded before it is taken."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 0

    def damaged(self, problem: str, at: int | None = None) -> BaseModelError:
        where = {"file": self.path, "byte": self.at if at is None else at}
        return BaseModelError(f"damaged GGUF file: {problem}", where=where, hint=_DAMAGED)

    def unsafe(self, problem: str, at: int | None = None) -> UnsafeError:
        where = {"file": self.path, "byte": self.at if at is None else at}
        return UnsafeError(f"refused GGUF file: {problem}", where=where, hint=_REFUSED)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.damaged(f"it ends inside {what}, which needs {count:,} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str, limit: int = MAX_STRING) -> str:
        start = self.at
        length = self.number("<Q", what)
        if length > limit:
            raise self.unsafe(f"{what} claims {length:,} bytes, more than {limit:,}", start)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8", start) from error

    def header(self) -> GGUFHeader:
        if self.take(4, "its magic number") != _MAGIC:
            raise self.damaged("not a GGUF file: it does not start with 'GGUF'", 0)
        version = self.number("<I", "its version")
        if version not in (2, 3):
            swapped = version > 0xFFFF
            raise self.damaged(
                "big-endian files are not read" if swapped else f"version {version} is not read", 4
            )
        tensors = self.count(MAX_TENSORS, "tensors")
        keys = self.count(MAX_KEYS, "metadata keys")
        metadata = self.metadata(keys)
        metadata_end = self.at
        table = self.table(tensors, metadata)
        header = GGUFHeader(version, metadata, table, metadata_end)
        self.consistent(header)
        return header

    def count(self, limit: int, what: str) -> int:
        start = self.at
        claimed: int = self.number("<Q", f"the number of {what}")
        if claimed > limit:
            raise self.unsafe(f"it claims {claimed:,} {what}, more than {limit:,}", start)
        return claimed

    def metadata(self, keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(keys):
            start = self.at
            key = self.text(f"metadata key {index}", MAX_NAME)
            if key in metadata:
                raise self.damaged(f"metadata key '{key}' comes twice", start)
            metadata[key] = self.value(self.number("<I", f"the type of '{key}'"), key)
        return metadata

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"'{key}'")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.damaged(f"'{key}' has unknown type {kind}", self.at - 4)
        value = self.number(_SCALARS[kind], f"'{key}'")
        return bool(value) if kind == _BOOL else value

    def array(self, key: str) -> Array:
        """Step over an array; strings are measured one by one, scalars at once."""
        kind = self.number("<I", f"the item type of '{key}'")
        start = self.at
        length = self.number("<Q", f"the length of '{key}'")
        if kind == _ARRAY:
            raise self.unsafe(f"'{key}' nests arrays", start - 4)
        if kind != _STRING and kind not in _SCALARS:
            raise self.damaged(f"items of '{key}' have unknown type {kind}", start - 4)
        if length > MAX_ITEMS:
            raise self.unsafe(f"'{key}' claims {length:,} items, more than {MAX_ITEMS:,}", start)
        smallest = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
        if length * smallest > self.size - self.at:
            raise self.damaged(f"'{key}' claims {length:,} items, more than the file holds", start)
        if kind == _STRING:
            for _ in range(length):
                self.skip_text(key)
        else:
            self.at += length * smallest
        return Array(length)

    def skip_text(self, key: str) -> None:
        length = self.number("<Q", f"an item of '{key}'")
        if length > MAX_STRING:
            raise self.unsafe(
                f"an item of '{key}' claims {length:,} bytes, more than {MAX_STRING:,}", self.at - 8
            )
        if length > self.size - self.at:
            raise self.damaged(f"it ends inside an item of '{key}'", self.at - 8)
        self.at += length

    def table(self, count: int, metadata: dict[str, Any]) -> tuple[GGUFTensor, ...]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise self.damaged(f"'general.alignment' is {alignment!r}, not a power of two up to 65,536")
        entries = [self.entry(index) for index in range(count)]
        start = -(-self.at // alignment) * alignment
        tensors = tuple(self.placed(entry, start, alignment) for entry in entries)
        names = Counter(tensor.name for tensor in tensors)
        if twice := [name for name, times in names.items() if times > 1]:
            raise self.damaged(f"tensor '{twice[0]}' comes {names[twice[0]]} times")
        ordered = sorted(tensors, key=lambda tensor: tensor.start)
        for before, after in itertools.pairwise(ordered):
            if before.start + before.bytes > after.start:
                raise self.unsafe(f"tensors '{before.name}' and '{after.name}' overlap", after.start)
        return tensors

    def entry(self, index: int) -> tuple[int, str, tuple[int, ...], int, int]:
        start = self.at
        name = self.text(f"the name of tensor {index}", MAX_NAME)
        rank = self.number("<I", f"the rank of '{name}'")
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise self.unsafe(f"tensor '{name}' claims {rank:,} dimensions, not 1 to {MAX_DIMENSIONS}", start)
        shape = tuple(self.number("<Q", f"the shape of '{name}'") for _ in range(rank))
        if 0 in shape:
            raise self.damaged(f"tensor '{name}' has an empty dimension", start)
        return start, name, shape, self.number("<I", f"the type of '{name}'"), self.number("<Q", f"'{name}'")

    def placed(
        self, entry: tuple[int, str, tuple[int, ...], int, int], base: int, alignment: int
    ) -> GGUFTensor:
        """Turn a table entry into a tensor whose bytes are known to lie inside the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        at, name, shape, kind, offset = entry
        if kind not in GGML_QUANT_SIZES:  # keyed by an IntEnum, so plain numbers are found
            raise self.damaged(f"tensor '{name}' has unknown weight format {kind}", at)
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[0] % block:
            raise self.damaged(
                f"tensor '{name}' has rows of {shape[0]:,} values, not whole blocks of {block}", at
            )
        length = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise self.damaged(f"tensor '{name}' starts at {offset:,}, not at a multiple of {alignment}", at)
        if base + offset + length > self.size:
            raise self.unsafe(f"tensor '{name}' of {length:,} bytes reaches past the end of the file", at)
        return GGUFTensor(name, shape[::-1], GGMLQuantizationType(kind).name, base + offset, length)

    def consistent(self, header: GGUFHeader) -> None:
        """Check the claims that would steer allocation later against the tensors that are there."""
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise self.damaged("'general.architecture' is missing", 24)
        if not header.tensors:
            raise self.damaged("it holds no tensor", 8)
        if header.metadata.get("general.type") == "adapter":
            return
        blocks = header.metadata.get(f"{architecture}.block_count")
        if type(blocks) is not int or not 0 < blocks <= len(header.tensors):
            raise self.damaged(
                f"'{architecture}.block_count' is {blocks!r} with {len(header.tensors)} tensors", 24
            )
