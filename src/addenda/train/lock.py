"""One writer per run folder: a lock that the system frees when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from addenda.errors import BusyError

__all__ = ["lock_run"]

_FILE = ".lock"
_held: dict[str, int] = {}  # real path of the folder -> thread that holds it


@contextlib.contextmanager
def lock_run(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``folder`` for this thread; made if it does not exist. Nested use by the same thread is allowed.

    The lock is the system's (flock), so it is free at once after a crash or ``kill -9``; the file that stays behind
    means nothing by itself.

    Raises:
        BusyError: another process or thread holds it; names the process id.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(path)
    if _held.get(key) == threading.get_ident():
        yield
        return
    with open(path / _FILE, "a+", encoding="utf-8") as file:
        if not _try_lock(file.fileno()):
            raise _busy(path)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _held[key] = threading.get_ident()
        try:
            yield
        finally:
            del _held[key]


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return _try_lock_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock_windows(descriptor: int) -> bool:
    import msvcrt

    # Windows forbids others to read a locked range, so the lock lies far behind the process id that they read.
    os.lseek(descriptor, 1 << 30, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except OSError:
        return False
    return True


def _busy(folder: Path) -> BusyError:
    owner = ""
    deadline = time.monotonic() + 0.5
    # The owner writes its number just after it has the lock.
    while not owner and time.monotonic() < deadline:
        owner = (folder / _FILE).read_text(encoding="utf-8").strip()
        time.sleep(0.0 if owner else 0.01)
    return BusyError(
        f"another run holds the folder '{folder}'",
        where={"process id": owner or "unknown"},
        hint="wait for it to end, or train into another folder",
    )
