"""A program read back: whether each adapted layer's weight is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from addenda.export.executorch.lowering import require_executorch

__all__ = ["findings"]


def findings(path: Path, meant: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
    """Return which layers' weights a program does not hold.

    A program keeps no names, but every weight to the bit, as it is or transposed.

    Args:
        path: the file.
        meant: weights with the adapter in them, by the paths of their layers.
        before: the same without it.
    """
    try:
        held = set(_blobs(path))
    except Exception as problem:  # noqa: BLE001  (a damaged file fails wherever it is come upon)
        return [
            f"'{path.name}' cannot be read: {(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
        ]
    wrong = []
    for layer, weight in meant.items():
        if held.isdisjoint(_forms(weight)):
            bare = not held.isdisjoint(_forms(before[layer]))
            wrong.append(f"'{layer}' has " + ("its weight without the adapter" if bare else "another weight"))
    return wrong


def _blobs(path: Path) -> Iterator[bytes]:
    serialized: Any = require_executorch("exir._serialize._program")
    file = serialized.deserialize_pte_binary(path.read_bytes())
    if file.named_data is not None:
        yield from (bytes(buffer) for buffer in file.named_data.buffers)
    for buffer in file.program.constant_buffer:
        yield bytes(buffer.storage)


def _forms(weight: Tensor) -> set[bytes]:
    return {form.contiguous().numpy().tobytes() for form in (weight.detach().cpu(), weight.detach().cpu().T)}
