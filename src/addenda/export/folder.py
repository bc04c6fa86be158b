"""An exported folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from addenda.bases.cache import sha256_of
from addenda.errors import AddendaError, BusyError, DiskFullError, ExportError

__all__ = ["new_folder", "require_room", "sums_of"]


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder beside ``target``; rename it into place at the end, remove it if the block fails.

    Raises:
        BusyError: ``target`` exists and is not empty.
        DiskFullError: the disk filled up.
        ExportError: it cannot be written there.
    """
    final = Path(target)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise BusyError(f"'{final}' exists and is not empty", hint="choose another --out, or remove it first")
    work = final.parent / f".{final.name}-{uuid.uuid4().hex[:12]}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        yield work
        for path in sorted(work.rglob("*")):
            if path.is_file():
                path.chmod(
                    0o644
                )  # safetensors writes for the owner alone; an export is there to be handed on
            _sync(path)
        _sync(work)
        if final.exists():
            final.rmdir()
        work.rename(final)
        _sync(final.parent)
    except AddendaError:
        raise
    except OSError as error:
        raise _unwritten(final, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_room(folder: Path, need: int) -> None:
    """Refuse an export for which the disk has no room.

    Raises:
        DiskFullError: it takes more bytes than there are.
    """
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskFullError(
            f"the export needs {need:,} bytes while it is proven, and the disk has {free:,} free",
            where={"folder": folder.parent},
            hint="free some space, or name a folder on a larger disk with --out",
        )


def _unwritten(final: Path, error: OSError) -> Exception:
    """What a failure of the system means to the user."""
    if error.errno == errno.ENOSPC:
        return DiskFullError(
            "the disk filled up while an export was written",
            where={"folder": final},
            hint="free some space, or name a folder on a larger disk with --out; nothing was left behind",
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
        return ExportError(
            f"'{final}' cannot be written: {error.strerror}", hint="name a folder of your own with --out"
        )
    return error


def sums_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path inside."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
