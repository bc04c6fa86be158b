"""The names of the export formats and what each is, read from the files of ``formats/`` without loading them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
from pathlib import Path

__all__ = ["format_names", "format_summaries"]


@functools.cache
def format_summaries() -> dict[str, str]:
    """Return the first line of each format's file, by its name.

    Example:
        >>> sorted(format_summaries())[-2:]
        ['onnx', 'peft']
    """
    found = importlib.util.find_spec("addenda.export.formats")
    assert found is not None
    folders = list(found.submodule_search_locations or ())
    made = {}
    for module in pkgutil.iter_modules(folders):
        source = (Path(folders[0]) / f"{module.name}.py").read_text(encoding="utf-8")
        made[module.name.replace("_", "-")] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return made


def format_names() -> list[str]:
    """Return the names, as ``--to`` and ``train.export_to`` take them.

    Example:
        >>> "peft" in format_names()
        True
    """
    return sorted(format_summaries())
