"""Packages that an extra brings, imported where they are needed and nowhere before."""

from __future__ import annotations

import importlib
from typing import Any

from addenda.errors import MissingDependencyError

__all__ = ["require"]


def require(extra: str, what: str, *names: str) -> Any:
    """Import packages and return the first one.

    Args:
        extra: the extra that brings them.
        what: what needs them, in the plural.
        names: of the modules.

    Raises:
        MissingDependencyError: one is not installed.

    Example:
        >>> require("peft", "such folders", "json").__name__
        'json'
    """
    try:
        first, *_ = [importlib.import_module(name) for name in names]
    except ImportError as problem:
        raise MissingDependencyError(
            f"{what} need the package '{problem.name or names[0]}', which is not installed",
            hint=f"pip install 'addenda[{extra}]'",
        ) from problem
    return first
