"""Checkpoints that are whole or not there: written beside, hashed, synced, renamed; no pickle.

A checkpoint is a folder ``step-000123`` with

- ``adapter.safetensors``    the adapter as it is at that step
- ``optimizer.safetensors``  AdamW's averages and step counts, ``<parameter>.<slot>``
- ``best.safetensors``       the best adapter so far, if there was an evaluation
- ``state.json``             step, early stopping, and the identity of the run
- ``MANIFEST.json``          format version, step, size and SHA-256 of each of the others

A folder without a manifest that verifies is not a checkpoint, whatever it is called. Order is by step number, never by
time of change: clocks jump.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from addenda.errors import CheckpointError, DiskFullError
from addenda.train.failpoints import failpoint
from addenda.train.parallel import Parallel

__all__ = [
    "Checkpoint",
    "Found",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "set_aside",
    "share_checkpoint",
    "sweep",
    "verify_checkpoint",
]

FORMAT = "addenda-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_REQUIRED = {"adapter.safetensors", "optimizer.safetensors", STATE}
_TEMPORARY = ".tmp-"
_CHUNK = 1 << 20
_SPARE = 1.2


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; tensors are on the CPU."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] | None
    state: dict[str, Any]
    """Plain values that JSON holds."""

    def tensor_files(self) -> dict[str, dict[str, Tensor]]:
        """The tensor files by name."""
        files = {"adapter.safetensors": self.adapter, "optimizer.safetensors": self.optimizer}
        return files if self.best is None else {**files, "best.safetensors": self.best}


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and newer ones that do not, each with its reason."""

    folder: Path | None
    skipped: dict[Path, str]


def save_checkpoint(checkpoint: Checkpoint, parent: Path, *, keep: int) -> tuple[Path, int]:
    """Write a checkpoint into ``parent``, verify it, then remove all but the newest ``keep``.

    Returns:
        Its folder and its size in bytes. One of the same step that verifies is left as it is.

    Raises:
        DiskFullError: there is no room; earlier checkpoints are untouched.
        CheckpointError: it cannot be written for another reason, or reads back differently.
    """
    target = parent / f"step-{checkpoint.step:06d}"
    temporary = parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    if target.exists() and not verify_checkpoint(target):
        return target, _size(target)
    if not parent.exists():
        parent.mkdir(parents=True)
        _sync_folder(parent.parent)
    need = _needed(checkpoint)
    try:
        with _disk_errors(parent, need):
            _check_room(parent, need)
            failpoint("checkpoint.begin")
            temporary.mkdir()
            _write_files(checkpoint, temporary)
            _publish(temporary, target)
    except BaseException:
        shutil.rmtree(
            temporary, ignore_errors=True
        )  # what cannot be removed now is removed by the next start
        raise
    problem = verify_checkpoint(target)
    if problem:
        raise CheckpointError(
            f"checkpoint '{target}' reads back differently: {problem}", hint="check the disk"
        )
    _rotate(parent, keep)
    return target, _size(target)


def _write_files(checkpoint: Checkpoint, folder: Path) -> None:
    files = {}
    for name, tensors in checkpoint.tensor_files().items():
        files[name] = _write(folder / name, save_safetensors(_contiguous(tensors)))
    files[STATE] = _write(folder / STATE, _json(checkpoint.state))
    failpoint("checkpoint.before_manifest")
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": checkpoint.step, "files": files}
    _write(folder / MANIFEST, _json(manifest))
    _sync_folder(folder)


def _publish(temporary: Path, target: Path) -> None:
    if target.exists():  # it does not verify, or it would have been left as it is
        _remove(target)
    failpoint("checkpoint.before_rename")
    os.rename(temporary, target)
    failpoint("checkpoint.after_rename")
    _sync_folder(target.parent)


def _write(path: Path, data: bytes) -> dict[str, object]:
    with open(path, "xb") as file:
        for start in range(0, len(data), _CHUNK):
            failpoint("checkpoint.write")
            file.write(data[start : start + _CHUNK])
        file.flush()
        failpoint("checkpoint.fsync")
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _needed(checkpoint: Checkpoint) -> int:
    tensors = [t for file in checkpoint.tensor_files().values() for t in file.values()]
    return int((sum(t.numel() * t.element_size() for t in tensors) + _CHUNK) * _SPARE)


def _check_room(parent: Path, need: int) -> None:
    if shutil.disk_usage(parent).free < need:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(parent))


@contextlib.contextmanager
def _disk_errors(parent: Path, need: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DiskFullError(
                "a checkpoint is larger than a file may be here",
                where={"path": parent, "need": f"{need:,} bytes"},
                hint="the checkpoints before it are untouched; raise the limit (ulimit -f) and resume",
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"cannot write a checkpoint: {(error.strerror or str(error)).lower()}",
                where={"path": error.filename or parent},
                hint="the checkpoints before it are untouched; put the folder right and resume",
            ) from error
        free = shutil.disk_usage(parent).free
        raise DiskFullError(
            "the disk is full: no room for a checkpoint",
            where={"path": parent, "need": f"{need:,} bytes", "free": f"{free:,} bytes"},
            hint="the checkpoints before it are untouched; free some space and resume",
        ) from error


def verify_checkpoint(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or "" if every byte is as it was written."""
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if _json(manifest) != text or set(manifest) != {"format", "format_version", "step", "files"}:
            return f"{MANIFEST} is damaged"
        if manifest["format"] != FORMAT or manifest["format_version"] != FORMAT_VERSION:
            return f"{MANIFEST} is of format {manifest['format']!r} version {manifest['format_version']!r}"
        if f"step-{manifest['step']:06d}" != folder.name:
            return f"{MANIFEST} is of step {manifest['step']}"
        return _verify_files(folder, manifest["files"])
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"


def _verify_files(folder: Path, files: dict[str, dict[str, object]]) -> str:
    lacking = _REQUIRED - set(files)
    if lacking:
        return f"{MANIFEST} does not name {', '.join(sorted(lacking))}"
    for name, facts in files.items():
        if Path(name).name != name:
            return f"{MANIFEST} names a file outside its folder"
        size = (folder / name).stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size} bytes instead of {facts['bytes']}"
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return f"{name} has changed since it was written"
    return ""


def find_checkpoint(parent: Path) -> Found:
    """Find the newest checkpoint that verifies."""
    skipped: dict[Path, str] = {}
    for _, folder in sorted(_listed(parent), reverse=True):
        problem = verify_checkpoint(folder)
        if not problem:
            return Found(folder, skipped)
        skipped[folder] = problem
    return Found(None, skipped)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it does not verify.
    """
    problem = verify_checkpoint(folder)
    if problem:
        raise CheckpointError(
            f"checkpoint '{folder}' is damaged: {problem}", hint="resume from an earlier one"
        )
    state = json.loads((folder / STATE).read_bytes())
    best = folder / "best.safetensors"
    return Checkpoint(
        step=json.loads((folder / MANIFEST).read_bytes())["step"],
        adapter=load_safetensors((folder / "adapter.safetensors").read_bytes()),
        optimizer=load_safetensors((folder / "optimizer.safetensors").read_bytes()),
        best=load_safetensors(best.read_bytes()) if best.exists() else None,
        state=state,
    )


def share_checkpoint(checkpoint: Checkpoint | None, parallel: Parallel) -> Checkpoint | None:
    """Hand the first process's checkpoint to all; the others need not see its disk, and what they give is ignored."""
    facts = parallel.agree(checkpoint and [checkpoint.step, checkpoint.state, checkpoint.best is not None])
    if facts is None or parallel.alone:
        return checkpoint
    step, state, has_best = facts
    given = checkpoint or Checkpoint(step, {}, {}, None, state)
    best = parallel.share(given.best or {}) if has_best else None
    return Checkpoint(step, parallel.share(given.adapter), parallel.share(given.optimizer), best, state)


def sweep(parent: Path) -> None:
    """Remove what an earlier process left half written; only the holder of the run's lock may call it."""
    for folder in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer looked at, and return its new place."""
    aside = folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, aside)
    return aside


def _rotate(parent: Path, keep: int) -> None:
    failpoint("checkpoint.rotate")
    for _, folder in sorted(_listed(parent))[:-keep]:
        _remove(folder)
    failpoint("checkpoint.rotated")


def _remove(folder: Path) -> None:
    # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
    doomed = folder.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _listed(parent: Path) -> list[tuple[int, Path]]:
    if not parent.is_dir():
        return []
    matches = ((re.fullmatch(r"step-(\d{6,})", folder.name), folder) for folder in parent.iterdir())
    return [(int(match[1]), folder) for match, folder in matches if match]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
