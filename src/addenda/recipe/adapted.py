"""An adapter with the base it was trained on, loaded from any folder that holds one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from addenda.bases import LoadedBase, with_chat_template
from addenda.core import Handle, load, read_manifest
from addenda.errors import NotFoundError
from addenda.export.mlx import import_mlx, is_mlx
from addenda.export.mlx.reading import read_config as read_mlx_config
from addenda.export.peft import CONFIG as PEFT_CONFIG
from addenda.export.peft import import_peft, read_config
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
        folder: an adapter folder of ours, the run folder around one, or a folder of PEFT or mlx-lm.
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
    if (place / PEFT_CONFIG).is_file() and not (place / "adapter.json").is_file():
        foreign = is_mlx(place)
        named = (
            read_mlx_config(place).get("model")
            if foreign
            else read_config(place).get("base_model_name_or_path")
        )
        settings = BaseSettings(_require_source(source or named, place), device=device)
        base = prepare_base(settings, dtype, on_event)
        return base, (import_mlx if foreign else import_peft)(base.model, place), {}
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
