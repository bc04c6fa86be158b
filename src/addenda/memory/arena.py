"""Memory for what a training step makes on the CPU: taken once, lent piece by piece, lent again when a piece is dead.

The C library's heap is either quick or exact. Where it keeps freed blocks, blocks of many sizes and lifetimes cut it
into holes that nothing fits into; where it gives them back, the machine fetches and clears their pages anew in every
step. An arena is one region whose pages stay. A piece of it is the storage of one tensor, and free again when that
storage is gone: whoever keeps a tensor keeps its piece, and nothing that can still be read is ever written over.
"""

from __future__ import annotations

import bisect
import math
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["Arena", "empty", "product"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest register."""

SMALLEST = 4096
"""Bytes: what is smaller is left to the heap."""

_serving: ContextVar[Arena | None] = ContextVar("addenda_arena", default=None)


class Arena:
    """A region of memory that tensors are lent pieces of.

    Args:
        size: bytes of the region; what was never used takes none. What does not fit in comes from the heap.

    Example:
        >>> arena = Arena(2**20)
        >>> with arena.serving():
        ...     x = empty((100, 64), like=torch.zeros(0))
        >>> arena.used, arena.holds(x)
        (25600, True)
        >>> del x
        >>> arena.used
        0
    """

    def __init__(self, size: int) -> None:
        size -= size % -mmap.PAGESIZE
        try:
            self._region = memoryview(_private_pages(size) if size else b"")
        except OSError:  # no such region to be had: the heap serves
            self._region = memoryview(b"")
        self._start = torch.frombuffer(self._region, dtype=torch.uint8).data_ptr() if self._region else 0
        self._free = [(0, self.size)]
        """Start and end of each free span, in order; none touches the next."""
        self._dead: deque[tuple[int, int]] = deque()
        """Pieces that died since the last look. A storage may die at any moment, in the middle of `_take` too."""

    @property
    def size(self) -> int:
        """Bytes of the region; 0 where the heap serves."""
        return len(self._region)

    @property
    def used(self) -> int:
        """Bytes that are lent."""
        self._bury()
        return self.size - sum(end - start for start, end in self._free)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Let `empty` and `product` take from this arena within the block."""
        token = _serving.set(self if self._region else None)
        try:
            yield
        finally:
            _serving.reset(token)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in this arena."""
        return 0 <= tensor.untyped_storage().data_ptr() - self._start < self.size

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return an uninitialised tensor in the lowest place it fits into, or None where there is no place."""
        size = math.prod(shape) * dtype.itemsize
        size -= size % -ALIGNMENT
        self._bury()
        place = next((i for i, (start, end) in enumerate(self._free) if end - start >= size), None)
        if place is None or size < SMALLEST:
            return None
        start, end = self._free.pop(place)
        if end - start > size:
            self._free.insert(place, (start + size, end))
        piece = self._region[start : start + size]
        weakref.finalize(piece, self._dead.append, (start, start + size)).atexit = False
        # Given its shape in place, it is no view of another tensor, which autograd would treat otherwise.
        return torch.frombuffer(piece, dtype=dtype, count=math.prod(shape)).resize_(tuple(shape))

    def _bury(self) -> None:
        while self._dead:
            start, end = self._dead.popleft()
            place = bisect.bisect(self._free, (start, end))
            if place < len(self._free) and self._free[place][0] == end:
                end = self._free.pop(place)[1]
            if place and self._free[place - 1][1] == start:
                place -= 1
                start = self._free.pop(place)[0]
            self._free.insert(place, (start, end))


def _private_pages(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # Large pages (madvise) were tried on Linux: no step was faster for them beyond what two runs differ by.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor, from the arena that serves or from the heap.

    Args:
        shape: its shape.
        like: gives the device, and where `dtype` is None that too.
        dtype: of its numbers.
    """
    arena, dtype = _serving.get(), dtype or like.dtype
    made = arena.take(shape, dtype) if arena is not None and like.device.type == "cpu" else None
    return like.new_empty(shape, dtype=dtype) if made is None else made


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (n, k), weight: (k, m), bias: (m,) -> x weight + bias: (n, m), in the arena that serves if there is one."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    if _serving.get() is None or torch.is_grad_enabled() or not plain:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    out = empty((len(x), weight.shape[1]), x)
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
