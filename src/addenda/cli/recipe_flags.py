"""The flags that say what to run, the same for every verb that takes a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from addenda.settings import BaseSettings, DataSettings, Recipe

__all__ = ["read_input", "read_recipe", "recipe_arguments", "recipe_flags"]

_FLAGS = (
    click.option(
        "--base",
        metavar="MODEL",
        help="A name from 'addenda models', a model folder, a .gguf file, a hub id.",
    ),
    click.option("--method", metavar="NAME", help="One of 'addenda methods'. [default: lora]"),
    click.option(
        "--targets", metavar="NAMES", help="Layers by the end of their path, with commas; or all-linear."
    ),
    click.option(
        "--recipe", "file", type=click.Path(path_type=Path), metavar="FILE", help="A recipe in TOML."
    ),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="One setting, such as train.epochs=3; repeatable.",
    ),
)


def recipe_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--base``, ``--method``, ``--targets``, ``--recipe`` and ``--set``; they arrive as keywords."""
    for flag in reversed(_FLAGS):
        function = flag(function)
    return function


def read_recipe(**flags: Any) -> Recipe:
    """Resolve the recipe from the flags; further keywords are dotted keys, with ``__`` for the dot."""
    from addenda.settings import resolve

    return resolve(**recipe_arguments(**flags))


def read_input(**flags: Any) -> tuple[BaseSettings, DataSettings]:
    """Resolve base and data alone, as `read_recipe` would; no method is loaded unless one is named."""
    from addenda.settings import resolve_input

    return resolve_input(**recipe_arguments(**flags))


def recipe_arguments(
    *,
    file: Path | None,
    sets: tuple[str, ...],
    base: str | None,
    method: str | None,
    targets: str | None,
    **more: object,
) -> dict[str, Any]:
    """Return the flags as `addenda.settings.resolve` takes them."""
    flags: dict[str, object] = {"base.source": base, "method.name": method, "method.targets": _split(targets)}
    flags.update({key.replace("__", "."): value for key, value in more.items()})
    return {"file": file, "sets": sets, "flags": flags}


def _split(targets: str | None) -> str | list[str] | None:
    return targets.split(",") if targets and "," in targets else targets
