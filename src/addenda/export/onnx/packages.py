"""The packages behind the extra ``onnx``, imported where they are needed and nowhere before."""

from __future__ import annotations

import importlib
from typing import Any

from addenda.errors import MissingDependencyError

__all__ = ["require"]


def require(*names: str) -> Any:
    """Import packages and return the first one.

    Raises:
        MissingDependencyError: one is not installed; names the extra that brings it.
    """
    try:
        first, *_ = [importlib.import_module(name) for name in names]
    except ImportError as problem:
        raise MissingDependencyError(
            f"ONNX files need the package '{problem.name or names[0]}', which is not installed",
            hint="pip install 'addenda[onnx]'",
        ) from problem
    return first
