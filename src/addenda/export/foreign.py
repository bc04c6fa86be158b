"""Adapters that other programs wrote: what a folder or file holds, which base it names, and how it is attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from addenda.bases import LoadedBase
from addenda.core.handle import Handle
from addenda.export.gguf.importing import base_of, import_gguf
from addenda.export.mlx import import_mlx, is_mlx
from addenda.export.mlx.reading import read_config as read_mlx
from addenda.export.peft import CONFIG, import_peft
from addenda.export.peft import read_config as read_peft

__all__ = ["Foreign", "foreign_adapter"]


@dataclass(frozen=True)
class Foreign:
    """An adapter in another program's form."""

    base: str | None
    """The base that it names."""
    attach: Callable[[LoadedBase], Handle]
    """Puts it on that base."""


def foreign_adapter(place: Path) -> Foreign | None:
    """Return the foreign adapter at a place, a folder or a GGUF file; None where there is none.

    Raises:
        AddendaError: what is there is damaged.
    """
    file = place / "adapter.gguf" if place.is_dir() else place
    if file.suffix == ".gguf" and file.is_file():
        return Foreign(base_of(file), lambda base: import_gguf(base, file))
    if is_mlx(place):
        return Foreign(read_mlx(place).get("model"), lambda base: import_mlx(base.model, place))
    if (place / CONFIG).is_file():
        named = read_peft(place).get("base_model_name_or_path")
        return Foreign(named, lambda base: import_peft(base.model, place))
    return None
