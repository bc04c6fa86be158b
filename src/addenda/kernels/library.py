"""The compiled kernels, or None; and the switch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from addenda.errors import KernelError
from addenda.kernels.build import build, built

__all__ = ["enable", "kernels", "kernels_off", "pending", "state"]


class _State:
    library: ctypes.CDLL | None = None
    reason: str = "not asked for"
    tried: bool = False
    off: int = 0
    lock = threading.Lock()


def enable(*, compile_now: bool = True) -> bool:
    """Load the kernels for this process; return whether they are there.

    Args:
        compile_now: False takes only a library that was compiled before.
    """
    with _State.lock:
        if _State.library is not None or (_State.tried and compile_now):
            return _State.library is not None
        try:
            path = build() if compile_now else built()
            if path is None:
                _State.reason = "not compiled yet"
                return False
            _State.tried = True
            _State.library = ctypes.CDLL(str(path))
            _State.reason = ""
        except (KernelError, OSError) as error:
            _State.tried = True
            _State.reason = str(error).splitlines()[0]
    return _State.library is not None


def state() -> str:
    """Return "" where the kernels run, else why they do not."""
    if _State.library is None:
        return _State.reason
    return "switched off" if _State.off else ""


def pending() -> bool:
    """Whether compiling was put off, and may still give kernels."""
    return _State.library is None and not _State.tried


def kernels() -> ctypes.CDLL | None:
    """Return the library where `enable` loaded it and nothing switched it off."""
    return None if _State.off else _State.library


@contextmanager
def kernels_off() -> Iterator[None]:
    """Run the plain forms within the block."""
    _State.off += 1
    try:
        yield
    finally:
        _State.off -= 1
