"""A safetensors file written a tensor at a time, so that a model's weights are never in memory together.

The format (safetensors' README, "Format") puts a JSON header in front that names every tensor's place, and allows
blanks at its end: room is left for it, and it is written when all tensors are.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from addenda.errors import ExportError

__all__ = ["TensorFile"]

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNED = 8
"""Bytes of the widest number: readers view a tensor's bytes where they lie."""
_ENTRY = 192
"""Bytes that a tensor's entry takes beside its name, at most."""


class TensorFile:
    """A safetensors file that grows; a context manager that finishes it, unless there was an error.

    Args:
        path: written anew.
        names: how many bytes the names of all tensors take together, at most.
        count: how many tensors there will be, at most.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with TensorFile(Path(place, "a.safetensors"), names=10, count=1) as file:
        ...         file.add("weight", torch.ones(2))
        ...     load_file(Path(place, "a.safetensors"))
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, path: Path, *, names: int, count: int) -> None:
        room = 64 + names + _ENTRY * count
        self._room = -(-room // _ALIGNED) * _ALIGNED
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._odd: list[tuple[str, Tensor]] = []
        self._size = 0
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; one whose bytes would put the next out of line waits for the end, as few are and small.

        Raises:
            ExportError: the format has no such numbers.
        """
        if tensor.nbytes % _ALIGNED:
            self._odd.append((name, tensor.detach().cpu().clone()))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in _NAMES:
            raise ExportError(
                f"a safetensors file holds no {tensor.dtype} as '{name}' is",
                hint=f"it holds {', '.join(sorted(str(each).removeprefix('torch.') for each in _NAMES))}",
            )
        data = tensor.detach().cpu().contiguous()
        end = self._size + data.nbytes
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, end],
        }
        if data.nbytes:
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._size = end

    def _finish(self) -> None:
        for name, tensor in sorted(self._odd, key=lambda each: -each[1].itemsize):
            self._write(name, tensor)
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ExportError(
                f"the header of '{self._file.name}' takes {len(header)} bytes, where {self._room} were left",
                hint="report this with the command that was run",
            )
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        with self._file:
            if kind is None:
                self._finish()
