"""Adapt a pretrained model to a task with a small trained add-on beside its frozen weights.

Importing this package imports nothing heavy: each name below is fetched from its room when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# GNU's OpenMP, which PyTorch on Linux runs on, lets a thread that waits for the others spin for milliseconds. Where
# other programs want the processor too, it spins away the time that the thread it waits for would need, thousands of
# times in a step. OpenMP reads this once, when PyTorch is imported; who set it or imported PyTorch before decides.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from addenda.bases import LoadedBase, load_base
    from addenda.bases.lean import lean
    from addenda.core import (
        Arrow,
        Handle,
        Method,
        Plan,
        Rows,
        Stack,
        Sum,
        activate,
        activated,
        attach,
        average,
        combine,
        detach,
        handles,
        load,
        load_all,
        observe,
        parallel,
        plan,
        save,
        save_all,
    )
    from addenda.errors import (
        AddendaError,
        BaseModelError,
        BusyError,
        CheckpointError,
        ConfigError,
        DataError,
        DiskFullError,
        ExportError,
        MethodError,
        MissingDependencyError,
        NotFoundError,
        OutOfMemory,
        TargetError,
        TrainingError,
        UnsafeError,
    )
    from addenda.export.run import export_adapter
    from addenda.methods.bitfit import BitFit
    from addenda.methods.bottleneck import Bottleneck
    from addenda.methods.ia3 import IA3
    from addenda.methods.lora import LoRA
    from addenda.recipe import run
    from addenda.settings import Recipe, resolve

__all__ = [
    "IA3",
    "AddendaError",
    "Arrow",
    "BaseModelError",
    "BitFit",
    "Bottleneck",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "ExportError",
    "Handle",
    "LoRA",
    "LoadedBase",
    "Method",
    "MethodError",
    "MissingDependencyError",
    "NotFoundError",
    "OutOfMemory",
    "Plan",
    "Recipe",
    "Rows",
    "Stack",
    "Sum",
    "TargetError",
    "TrainingError",
    "UnsafeError",
    "__version__",
    "activate",
    "activated",
    "attach",
    "average",
    "combine",
    "detach",
    "export_adapter",
    "handles",
    "lean",
    "load",
    "load_all",
    "load_base",
    "observe",
    "parallel",
    "plan",
    "resolve",
    "run",
    "save",
    "save_all",
]

_ROOMS = {
    "addenda.bases": ("LoadedBase", "load_base"),
    "addenda.bases.lean": ("lean",),
    "addenda.core": (
        "Arrow",
        "Handle",
        "Method",
        "Plan",
        "Rows",
        "Stack",
        "Sum",
        "activate",
        "activated",
        "attach",
        "average",
        "combine",
        "detach",
        "handles",
        "load",
        "load_all",
        "observe",
        "parallel",
        "plan",
        "save",
        "save_all",
    ),
    "addenda.export.run": ("export_adapter",),
    "addenda.methods.bitfit": ("BitFit",),
    "addenda.methods.bottleneck": ("Bottleneck",),
    "addenda.methods.ia3": ("IA3",),
    "addenda.methods.lora": ("LoRA",),
    "addenda.recipe": ("run",),
    "addenda.settings": ("Recipe", "resolve"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        return _method(name)
    room = next((room for room, names in _ROOMS.items() if name in names), "addenda.errors")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def _method(name: str) -> Any:
    """Return the method of that class name: a new one, an outside package's too, is offered without being listed."""
    if name[:1].isupper():
        from addenda.core import registry

        for each in registry.names():
            if registry.get(each).__name__ == name:
                return registry.get(each)
    raise AttributeError(f"module 'addenda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("addenda")
    except PackageNotFoundError:
        # Run from a source folder without an installation, there is no version to read.
        return "unknown"
