"""An adapter with the base it was trained on, loaded from any folder that holds one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from addenda.bases import LoadedBase, with_chat_template
from addenda.core import Handle, load, read_manifest
from addenda.errors import NotFoundError
from addenda.export.foreign import foreign_adapter
from addenda.recipe.folder import ADAPTER
from addenda.recipe.prepare import Note, OnRunEvent, prepare_base
from addenda.settings import BaseSettings

__all__ = ["load_adapted"]


def load_adapted(
    folder: str | os.PathLike[str],
    *,
    source: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    on_event: OnRunEvent,
) -> tuple[LoadedBase, Handle, dict[str, Any]]:
    """Load an adapter with the base it was trained on.

    Args:
        folder: an adapter folder of ours, the run folder around one, a folder of PEFT or mlx-lm.
        source: the base; None takes the one the adapter names.
        dtype: of the base's weights; None keeps the stored one.
        device: where it runs, as ``base.device`` in a recipe.
        on_event: told of progress and notes.

    Returns:
        The base, the handle, and the adapter's provenance.

    Raises:
        NotFoundError: the folder holds no adapter, or names no base.
    """
    place = Path(folder)
    place = place / ADAPTER if (place / ADAPTER / "adapter.json").is_file() else place
    if not (place / "adapter.json").is_file() and (foreign := foreign_adapter(place)):
        settings = BaseSettings(_require_source(source or foreign.base, place), device=device)
        base = prepare_base(settings, dtype, on_event)
        return base, foreign.attach(base), {}
    provenance = dict(read_manifest(place).get("provenance") or {})
    known = provenance.get("base") or {}
    # The same weights, to the bit: unpacked and rounded ones have another fingerprint than packed ones.
    chosen = _require_source(source or known.get("load"), place)
    settings = BaseSettings(chosen, weights=known.get("weights", "dense"), device=device)
    base = prepare_base(settings, dtype, on_event)
    template = provenance.get("chat_template")
    if template is not None and provenance.get("template_sha256") != base.template_sha256:
        base = with_chat_template(base, template)
        on_event(Note("base: the chat template is the one the adapter was trained with"))
    return base, load(base.model, place), provenance


def _require_source(source: object, place: Path) -> str:
    if not isinstance(source, str) or not source:
        raise NotFoundError(
            f"the adapter in '{place}' does not say which base it is for", hint="name it with --base"
        )
    return source
