"""What a run takes from the machine, chosen for the run at hand and said: threads, compiled kernels, the allocator."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from addenda import kernels
from addenda.bases.fast.compiled import why_not_compiled
from addenda.core.packed_layers import packed_numel

__all__ = ["Machine", "calibrating", "run_flop", "set_allocator", "use_machine"]

WORTH_COMPILING = 60.0
"""Seconds of a run, by a rough guess, from which on compiling (a few seconds) costs less than the kernels save."""

FLOP_PER_SECOND = 1e11
"""Of one thread, for that guess."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
KEEPING = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**20))
GIVING_BACK = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 2**18), (_TRIM_THRESHOLD, 2**20), (_TOP_PAD, 2**17))
"""Parameters of glibc's mallopt, and their values. Even where blocks are kept, those of 32 MiB and more (scores of the
vocabulary) are given back: they would be cut up by the small ones, and a new one found no place."""


@dataclass
class Machine:
    """The choices for one run."""

    device: str
    """``cpu``, or the GPU's name and number."""
    threads: int
    """CPU threads of PyTorch and of the kernels."""
    kernels: bool
    """Whether the compiled kernels run."""
    why: str
    """Why not, or ""."""
    keeps_memory: bool = False
    """Whether freed memory stays with the process, so that the next step need not fetch and clear its pages anew."""

    def __str__(self) -> str:
        if self.device != "cpu":
            why_not = why_not_compiled() if torch.cuda.is_available() else ""
            return f"{self.device}, " + (
                f"nothing compiled for it ({why_not})" if why_not else "compiled for it"
            )
        loops = "compiled kernels" if self.kernels else f"no compiled kernels ({self.why})"
        memory = ", freed memory kept for the next step" if self.keeps_memory else ""
        return f"{self.threads} CPU threads, {loops}{memory}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the kernels within the block, or not, as chosen."""
        if self.kernels:
            yield
            return
        with kernels.kernels_off():
            yield


def run_flop(model: nn.Module, tokens: float) -> float:
    """Return roughly what a run takes: a product forward and one backward with every weight, for every token."""
    return 4.0 * (sum(p.numel() for p in model.parameters()) + packed_numel(model)) * tokens


def use_machine(*, wanted: bool, flop: float, device: torch.device) -> Machine:
    """Choose for a run, and set what is set for the whole process.

    Args:
        wanted: False leaves the compiled kernels out.
        flop: the run's floating-point operations, roughly.
        device: where it runs; kernels and allocator are for the CPU.

    Example:
        >>> use_machine(wanted=False, flop=1e12, device=torch.device("cpu")).why
        'switched off'
    """
    name, threads = _name_of(device), torch.get_num_threads()
    if device.type != "cpu":
        return Machine(name, threads, kernels=False, why="they are for the CPU")
    if not wanted:
        return Machine(name, threads, kernels=False, why="switched off")
    there = kernels.enable(compile_now=flop / FLOP_PER_SECOND / threads >= WORTH_COMPILING)
    reason = "the run is too short to be worth compiling" if kernels.pending() else kernels.state()
    return Machine(name, threads, kernels=there, why="" if there else reason)


def _name_of(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else device.type


def set_allocator(*, keep: bool) -> bool:
    """Tell the allocator, for the whole process, what to do with freed blocks; return whether they are kept.

    Args:
        keep: True keeps them: a step asks for the same sizes again, and fetching a page costs about as much as a pass
            over it, more in a virtual machine. False gives large ones back at once, which holds no byte too many and
            costs a fifth of the speed. Only glibc can be told.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, _ = libc.mallopt, libc.gnu_get_libc_version
    except (OSError, AttributeError, TypeError):
        return False
    chosen = KEEPING if keep else GIVING_BACK
    return all(mallopt(what, value) for what, value in chosen) and keep


@contextmanager
def calibrating(threads: int | None) -> Iterator[None]:
    """Run the block as a training run would, with as many threads and freed memory kept; then give that back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    kept = set_allocator(keep=True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if kept:
            set_allocator(keep=False)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
