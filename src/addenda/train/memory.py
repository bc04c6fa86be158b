"""How much memory a run takes: measured, estimated beforehand, and what to do when it is not enough."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from addenda.bases.packed import PackedModel
from addenda.bases.scores import CHUNK_BYTES
from addenda.core.handle import Handle
from addenda.errors import OutOfMemory

__all__ = [
    "MemoryEstimate",
    "estimate_memory",
    "out_of_memory_named",
    "peak_memory_bytes",
]

_BYTES_ASKED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|KiB|MiB|GiB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def peak_memory_bytes() -> dict[str, int]:
    """Return the most memory this process has held: ``rss`` of the machine's, and ``cuda`` where there is a GPU.

    Example:
        >>> peak_memory_bytes()["rss"] > 10_000_000
        True
    """
    peaks = {"rss": _peak_rss()}
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def _peak_rss() -> int:
    if sys.platform.startswith("linux"):
        # getrusage would also count what the parent process held when it started this one.
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run will hold at its fullest, in bytes.

    total = present + trained + activations + scores, where

    - ``present`` is what the process holds already: Python, PyTorch, the base, the adapter;
    - ``trained`` is 16 bytes for each trained number (its gradient, AdamW's two averages, the copy of the best
      adapter), all float32;
    - ``activations`` is what the backward pass needs of each token, measured on a short row, times the tokens of a
      micro-batch, and as much again of the largest layer for the gradients passing through;
    - ``scores`` is one chunk of scores over the vocabulary with its gradient.
    """

    present: int
    trained: int
    activations: int
    scores: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.present + self.trained + self.activations + self.scores


def estimate_memory(handle: Handle, packed: PackedModel, *, tokens: int) -> MemoryEstimate:
    """Estimate the memory of training an attached adapter, from one short forward pass.

    Args:
        handle: the adapter; its model must be on the CPU or a GPU, not on the meta device.
        packed: the model as it will be run.
        tokens: tokens of the largest micro-batch (a single longer row counts as one).
    """
    short, long = (_saved_bytes(handle, packed, count) for count in (32, 96))
    per_token = max(0, long - short) / 64
    with torch.no_grad():
        token = torch.zeros(1, dtype=torch.long, device=_device(handle))
        vocabulary = packed.logits(packed.hidden(token, [1])).shape[-1]
    return MemoryEstimate(
        present=psutil.Process().memory_info().rss,
        trained=16 * handle.trainable_parameters,
        activations=int(per_token * tokens),
        scores=5 * min(CHUNK_BYTES, 4 * tokens * vocabulary),
    )


def _saved_bytes(handle: Handle, packed: PackedModel, tokens: int) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in [*handle.model.parameters(), *handle.model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(tokens, dtype=torch.long, device=_device(handle))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = packed.hidden(ids, [tokens])
    return sum(kept.values()) + hidden.untyped_storage().nbytes()


def _device(handle: Handle) -> torch.device:
    return next(handle.parameters()).device


@contextlib.contextmanager
def out_of_memory_named(settings: dict[str, tuple[object, object]]) -> Iterator[None]:
    """Turn a failed allocation inside the block into an error that says what to change.

    Args:
        settings: by setting, its present and a smaller value.

    Raises:
        OutOfMemory: with the bytes asked for and free, and the settings.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemory) or not _is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "the step did not fit into memory",
            where={"asked for": _asked(error), "free": f"{psutil.virtual_memory().available:,} bytes"},
            hint="; or ".join(f"set {key}={smaller} (now {now})" for key, (now, smaller) in settings.items()),
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(
        sign in text for sign in ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    )


def _asked(error: BaseException) -> str:
    found = _BYTES_ASKED.search(str(error))
    return (
        f"{int(float(found[1]) * _UNITS[found[2] or '']):,} bytes" if found else "an unknown number of bytes"
    )
