"""How much memory a run takes: measured, estimated beforehand, and what to do when it is not enough."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from addenda.bases.packed import PackedModel
from addenda.bases.scores import chunk_bytes
from addenda.core.handle import Handle
from addenda.errors import OutOfMemory
from addenda.kernels import calls
from addenda.memory.arena import Arena
from addenda.memory.available import available_memory

__all__ = [
    "BYTES_PER_TRAINED",
    "Ledger",
    "MemoryModel",
    "measure_memory",
    "memory_limit",
    "out_of_memory_named",
    "peak_memory_bytes",
]

SHARE_OF_FREE = 0.9
"""Of the memory that is free now: other programs go on growing."""

FRAGMENTED = 0.3
"""What glibc's heap holds unused when it keeps freed blocks, as a share of the activations in it; seen on SmolLM2."""

SMALL_THINGS, SMALL_THINGS_ON_GPU = 32 * 2**20, 512 * 2**20
"""Tables of kernels, threads' own buffers, Python's objects of a step; on a GPU the libraries' workspaces, and packed
weights while they are unpacked. Guessed, and enough for the steps that tests/gpu measured on an H200."""

ON_THE_WAY = 3
"""Blocks whose activations are on the GPU where they are offloaded: one computed, one leaving, one coming back."""

BYTES_PER_TRAINED, BYTES_COPIED = 16, 12
"""Of each trained number, while training and while a checkpoint is written."""

SHORT, LONG = 64, 192
"""Tokens of the rows that are measured; whole multiples of 64, to which rows are filled up."""

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
class Ledger:
    """What a run will hold at its fullest, in bytes, item by item."""

    present: int
    """What the process holds already: Python, PyTorch, the base, the adapter. On a GPU what lies there."""
    trained: int
    """16 bytes for each trained number: its gradient, AdamW's two averages, the copy of the best adapter; float32."""
    activations: int
    """What the forward pass of the largest micro-batch keeps for the backward."""
    scores: int
    """Chunks of scores over the vocabulary, and their gradient."""
    overhead: int
    """What passes through the largest block, and what the allocator holds without using it; or, where that is more,
    what a checkpoint copies while it is written: the trained numbers and their averages."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.present + self.trained + self.activations + self.scores + self.overhead

    def __str__(self) -> str:
        items = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in vars(self).items())
        return f"{self.total / 2**20:,.0f} MiB ({items})"


@dataclass(frozen=True)
class MemoryModel:
    """From a number of tokens to the memory they take, measured on short rows."""

    present: int
    trained: int
    kept_per_token: float
    """Bytes that the forward pass keeps for the backward, of each token of a micro-batch."""
    loose_per_token: float
    """Of them, those that no arena holds: they lie on the heap."""
    least_per_token: float
    """The same where every block keeps its input alone."""
    vocabulary: int
    blocks: int
    """Blocks that can keep their input alone; 0 where none can."""
    on_gpu: bool = False
    """Whether it runs on a GPU, where larger chunks of scores are made, and without the compiled kernels."""
    offloaded: bool = False
    """Whether activations wait in the machine's memory."""

    def ledger(self, tokens: int, recompute: int = 0, *, keeps_memory: bool = False) -> Ledger:
        """Return the ledger of a micro-batch.

        Args:
            tokens: its tokens.
            recompute: blocks that keep their input alone, 0 to ``blocks``.
            keeps_memory: whether the allocator keeps what is freed.
        """
        block = (self.kept_per_token - self.least_per_token) / max(self.blocks, 1)
        there = min(1.0, ON_THE_WAY / max(self.blocks, 1)) if self.offloaded else 1.0
        activations = int(tokens * (self.kept_per_token - recompute * block) * there)
        chunk = min(chunk_bytes(on_gpu=self.on_gpu), 4 * tokens * self.vocabulary)
        at_once = 6 if self.on_gpu else 1 if calls.usable(torch.empty(0)) else 3
        loose = activations * self.loose_per_token / max(self.kept_per_token, 1.0)
        unused = FRAGMENTED * loose if keeps_memory else 0
        scores = at_once * chunk
        small = SMALL_THINGS_ON_GPU if self.on_gpu else SMALL_THINGS
        overhead = int(block * tokens * (1.5 if recompute else 0.5) + unused) + small
        copied = self.trained * BYTES_COPIED // BYTES_PER_TRAINED
        return Ledger(self.present, self.trained, activations, scores, max(overhead, copied - scores))

    def recompute_for(self, tokens: int, limit: int) -> int | None:
        """Return the fewest blocks to run again so that a micro-batch fits into `limit` bytes; None: it never does."""
        fits = (k for k in range(self.blocks + 1) if self.ledger(tokens, k).total <= limit)
        return next(fits, None)

    def most_tokens(self, limit: int) -> int:
        """Return how many tokens fit into `limit` bytes where every block runs again; 0 for none."""
        low, high = 0, 2**24
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.ledger(middle, self.blocks).total <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def suited(self, offload: str, longest: int, limit: int) -> MemoryModel:
        """Return the model with activations offloaded, if that was asked for or the longest row fits no other way."""
        scarce = offload == "auto" and self.on_gpu and self.recompute_for(longest, limit) is None
        return dataclasses.replace(self, offloaded=offload == "activations" or scarce)


def measure_memory(handle: Handle, packed: PackedModel, *, also_trained: int = 0) -> MemoryModel:
    """Measure what a token takes, by short forward passes.

    Args:
        handle: the adapter; its model must be on the CPU or a GPU, not on the meta device.
        packed: the model as it will be run.
        also_trained: numbers that other adapters train in the same process.
    """
    device = _device(handle)
    kept, least = (_saved_per_token(handle, packed, recompute=k) for k in (0, packed.blocks))
    arena = Arena(int(2 * kept * LONG))
    with arena.serving():
        loose = _saved_per_token(handle, packed, outside=arena)
    with torch.no_grad():
        hidden = packed.hidden(torch.zeros(1, dtype=torch.long, device=device), [1])
        vocabulary = packed.logits(hidden).shape[-1]
    on_gpu = device.type == "cuda"
    return MemoryModel(
        present=torch.cuda.memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss,
        trained=BYTES_PER_TRAINED * (handle.trainable_parameters + also_trained),
        kept_per_token=max(0.0, kept),
        loose_per_token=max(0.0, loose),
        least_per_token=max(0.0, least),
        vocabulary=vocabulary,
        blocks=packed.blocks,
        on_gpu=on_gpu,
    )


def memory_limit(device: torch.device, gib: float | None = None, *, shared_by: int = 1) -> int:
    """Return the bytes that a run may hold on `device`, what it holds already included.

    Args:
        device: where it runs.
        gib: a limit in GiB; None takes what is free now, in this container where it has a limit of its own.
        shared_by: processes of the run that share what is free on the CPU.

    Example:
        >>> memory_limit(torch.device("cpu"), 2.0)
        2147483648
    """
    if gib is not None:
        return int(gib * 2**30)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    return int(available_memory() * SHARE_OF_FREE / shared_by) + psutil.Process().memory_info().rss


def _saved_per_token(
    handle: Handle, packed: PackedModel, *, recompute: int = 0, outside: Arena | None = None
) -> float:
    """Return the bytes that a forward pass keeps of each token for its backward pass; `outside` an arena alone."""
    short, long = (_saved_bytes(handle, packed, tokens, recompute, outside) for tokens in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def _saved_bytes(
    handle: Handle, packed: PackedModel, tokens: int, recompute: int, outside: Arena | None
) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in [*handle.model.parameters(), *handle.model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not (outside is not None and outside.holds(tensor)):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output would hold the node that keeps it, and neither would ever be freed

    ids = torch.zeros(tokens, dtype=torch.long, device=_device(handle))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        note(packed.hidden(ids, [tokens], recompute=recompute))
    return sum(kept.values())


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
            where={"asked for": _asked(error), "free": f"{_free(error):,} bytes"},
            hint="; or ".join(f"set {key}={smaller} (now {now})" for key, (now, smaller) in settings.items()),
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(
        sign in text for sign in ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    )


def _free(error: BaseException) -> int:
    if torch.cuda.is_available() and "CUDA" in str(error):
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def _asked(error: BaseException) -> str:
    found = _BYTES_ASKED.search(str(error))
    return (
        f"{int(float(found[1]) * _UNITS[found[2] or '']):,} bytes" if found else "an unknown number of bytes"
    )
