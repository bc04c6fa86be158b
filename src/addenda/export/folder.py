"""An exported folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from addenda.bases.cache import sha256_of
from addenda.errors import BusyError

__all__ = ["new_folder", "sums_of"]


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder beside ``target``; rename it into place at the end, remove it if the block fails.

    Raises:
        BusyError: ``target`` exists and is not empty.
    """
    final = Path(target)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise BusyError(f"'{final}' exists and is not empty", hint="choose another --out, or remove it first")
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.parent / f".{final.name}-{uuid.uuid4().hex[:12]}"
    work.mkdir()
    try:
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
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
