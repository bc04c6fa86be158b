"""An exported folder appears whole or not at all, beside a record of what it is and how it was proven."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from addenda.errors import BusyError
from addenda.export.parity import Parity

__all__ = ["new_folder", "write_record"]


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


def write_record(folder: Path, *, form: str, parity: Parity, provenance: Mapping[str, Any]) -> None:
    """Write ``export.json``: the form, the proof, and where the adapter came from."""
    record = {"form": form, "parity": asdict(parity), "provenance": dict(provenance)}
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    (folder / "export.json").write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
