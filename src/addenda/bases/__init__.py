"""Base models: fetching, checking and loading them, and running them fast."""

from __future__ import annotations

from addenda.bases.load import DEFAULT_BASE, list_models, load_base
from addenda.bases.loaded import LoadedBase
from addenda.bases.registry import ModelCard
from addenda.bases.template import render_chat, with_chat_template

__all__ = [
    "DEFAULT_BASE",
    "LoadedBase",
    "ModelCard",
    "list_models",
    "load_base",
    "render_chat",
    "with_chat_template",
]
