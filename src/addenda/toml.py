"""TOML as recipes use it: files read with errors that say where, single values parsed and written."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from addenda.errors import ConfigError, NotFoundError

__all__ = ["parse_value", "read_recipe_file", "read_table", "toml_value"]


def read_table(path: Path, name: str) -> dict[str, Any]:
    """Return one table of a recipe file that is no setting of a run, such as ``sweep``; empty where it has none.

    Raises:
        ConfigError, NotFoundError: the file cannot be read.
    """
    table = read_recipe_file(path).get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"'{name}' in recipe '{path}' must be a table", hint=f"write [{name}]")
    return dict(table)


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Return what a recipe file holds, table by table.

    Raises:
        ConfigError: it cannot be read, or is not TOML in UTF-8.
        NotFoundError: it does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(
            f"no recipe at '{path}'", hint="'addenda train --dry-run' prints one to start from"
        ) from None
    except OSError as problem:
        raise ConfigError(
            f"recipe '{path}' cannot be read: {(problem.strerror or str(problem)).lower()}",
            hint="name a TOML file, such as RUN/recipe.resolved.toml",
        ) from None
    except UnicodeDecodeError as wrong:
        raise ConfigError(
            f"recipe '{path}' is not UTF-8 at byte {wrong.start}", hint="save it as UTF-8"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as wrong:
        raise ConfigError(f"recipe '{path}' is not TOML: {wrong}", hint="text needs double quotes") from None


def parse_value(text: str) -> Any:
    """Return a value spelled as in TOML; anything else is text.

    Example:
        >>> parse_value("3e-4"), parse_value("true"), parse_value("q_proj")
        (0.0003, True, 'q_proj')
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def toml_value(value: Any) -> str:
    """Return a value as TOML spells it, on one line.

    Example:
        >>> toml_value({"a": (1, 0.5, "x")})
        '{"a" = [1, 0.5, "x"]}'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON's text is TOML's basic string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
