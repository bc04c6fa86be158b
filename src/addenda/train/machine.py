"""What a run takes from the machine, chosen for the run at hand and said: threads, compiled kernels, the allocator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from addenda import kernels

__all__ = ["Machine", "use_machine"]

WORTH_COMPILING = 60.0
"""Seconds of a run, by a rough guess, from which on compiling (a few seconds) costs less than the kernels save."""

FLOP_PER_SECOND = 1e11
"""Of one thread, for that guess."""

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
"""Parameters of glibc's mallopt."""


@dataclass
class Machine:
    """The choices for one run."""

    threads: int
    """CPU threads of PyTorch and of the kernels."""
    kernels: bool
    """Whether the compiled kernels run."""
    why: str
    """Why not, or ""."""
    keeps_memory: bool
    """Whether freed memory stays with the process, so that the next step need not fetch and clear its pages anew."""

    def __str__(self) -> str:
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
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return Machine(threads, kernels=False, why="they are for the CPU", keeps_memory=False)
    keeps = _keep_freed_memory()
    if not wanted:
        return Machine(threads, kernels=False, why="switched off", keeps_memory=keeps)
    there = kernels.enable(compile_now=flop / FLOP_PER_SECOND / threads >= WORTH_COMPILING)
    reason = "the run is too short to be worth compiling" if kernels.pending() else kernels.state()
    return Machine(threads, kernels=there, why="" if there else reason, keeps_memory=keeps)


def _keep_freed_memory() -> bool:
    """Tell glibc not to give freed blocks back to the system: a step asks for the same sizes again.

    Fetching a page costs about as much as a pass over it, several times in a virtual machine.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(
        mallopt(what, value)
        for what, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    )
