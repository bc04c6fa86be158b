"""The packages behind the extra ``onnx``, imported where they are needed and nowhere before."""

from __future__ import annotations

from typing import Any

from addenda.export import packages

__all__ = ["require"]


def require(*names: str) -> Any:
    """Import packages and return the first one.

    Raises:
        MissingDependencyError: one is not installed; names the extra that brings it.
    """
    return packages.require("onnx", "ONNX files", *names)
