"""Writes a GGUF file a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.bases import LoadedBase, formats
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ConfigError
from addenda.export.gguf.architectures import Value
from addenda.export.gguf.layout import Layout, layout_of
from addenda.export.gguf.metadata import base_keys
from addenda.export.own import OwnTensors

__all__ = ["add_key", "write_base", "written_kinds"]

_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}
"""What ``general.file_type`` says of a file whose matrices are all of that kind."""


def written_kinds() -> list[str]:
    """Return the kinds that `write_base` writes matrices in.

    Example:
        >>> written_kinds()[:3]
        ['F32', 'F16', 'Q4_0']
    """
    return list(_FILE_TYPES)


def write_base(
    base: LoadedBase,
    target: Path,
    *,
    kind: str = "F32",
    state: Mapping[str, Tensor] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a base as a GGUF file that llama.cpp runs.

    Everything is checked before anything is written, and a write that fails leaves what was there. Norms, biases and
    whatever else is no matrix stay float32, and so do matrices whose rows are not whole blocks of the kind.

    Args:
        base: a causal model; adapters on it are left out, and packed weights unpacked.
        target: the file; one that is there is replaced.
        kind: one of `written_kinds`.
        state: other tensors under the names and in the shapes of the model's own, e.g. with an adapter folded in;
            each is asked for twice, the first time for its shape, so it may be made when it is asked for.
        on_progress: told of the bytes written.

    Raises:
        ExportError: llama.cpp would not run the model as it is; with what stands against it.
        ConfigError: no such kind.
    """
    if kind not in _FILE_TYPES:
        raise ConfigError(
            f"no GGUF file is written in '{kind}'",
            where={"known": ", ".join(_FILE_TYPES)},
            hint="take one of those",
        )
    layout = layout_of(base.model.config)
    keys = base_keys(base, layout)
    keys |= {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    tensors = _Tensors(layout, OwnTensors(base.model) if state is None else state, formats.get(kind))
    work = target.with_name(f".{target.name}.part")
    try:
        _write(work, keys, tensors, on_progress)
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Tensors:
    """What the file is to hold, made one by one."""

    layout: Layout
    state: Mapping[str, Tensor]
    format: formats.WeightFormat

    def packed(self, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor, str]]:
        """Yield the name, the bytes of each row and the kind of each tensor; without numbers, to know the shapes."""
        yield from (self._packed(name, tensor) for name, tensor in self.layout.added().items())
        for name in self.state:
            tensor = self.state[name].detach()
            if shapes_only:
                tensor = torch.empty_like(tensor, device="meta")
            yield from (self._packed(*kept) for kept in self.layout.tensors(name, tensor).items())

    def _packed(self, name: str, tensor: Tensor) -> tuple[str, Tensor, str]:
        whole = tensor.ndim > 1 and tensor.shape[-1] % (self.format.block or 1) == 0
        form = self.format if whole else formats.get("F32")
        rows = form.quantize(tensor.reshape(-1, tensor.shape[-1]))
        return name, rows.view(*tensor.shape[:-1], -1), form.name


def _write(path: Path, keys: Mapping[str, Value], tensors: _Tensors, on_progress: OnProgress | None) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(None, tensors.layout.architecture.name)
    for key, value in keys.items():
        add_key(writer, key, value)
    total = 0
    for name, rows, kind in tensors.packed(shapes_only=True):
        bytes_ = np.dtype("uint8")
        writer.add_tensor_info(name, tuple(rows.shape), bytes_, rows.numel(), gguf.GGMLQuantizationType[kind])
        total += rows.numel()
    done = 0
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, rows, _ in tensors.packed():
            writer.write_tensor_data(rows.cpu().numpy())
            done += rows.numel()
            if on_progress:
                on_progress(Progress("write the GGUF file", done, total, "bytes"))
    finally:
        writer.close()


def add_key(writer: Any, key: str, value: Value) -> None:
    """Give a ``gguf.GGUFWriter`` one key, its type told from the value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
