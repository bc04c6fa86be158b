"""The composition root: a recipe is run from rows to report here, the only room that knows every other."""

from __future__ import annotations

from addenda.recipe.adapted import load_adapted
from addenda.recipe.folder import RunSummary
from addenda.recipe.planner import Setup
from addenda.recipe.prepare import (
    Note,
    OnRunEvent,
    encode_all,
    encoder_for,
    number_format,
    plan_run,
    prepare_base,
    prepare_data,
)
from addenda.recipe.runner import run, with_folder

__all__ = [
    "Note",
    "OnRunEvent",
    "RunSummary",
    "Setup",
    "encode_all",
    "encoder_for",
    "load_adapted",
    "number_format",
    "plan_run",
    "prepare_base",
    "prepare_data",
    "run",
    "with_folder",
]
