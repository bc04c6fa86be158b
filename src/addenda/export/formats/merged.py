"""A model folder that transformers loads, with the adapter folded into the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from addenda.bases import LoadedBase
from addenda.core.handle import Handle
from addenda.core.planning import Plan
from addenda.core.progress import OnProgress
from addenda.export.format import Format
from addenda.export.merged import export_merged
from addenda.export.parity import Parity

__all__ = ["FORMAT", "Merged"]


class Merged(Format):
    """Safetensors, tokenizer and template of a model that needs no adapter any more."""

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def problems(self, planned: Plan, base: LoadedBase) -> list[str]:
        found = []
        if not planned.method.mergeable:
            found.append(f"method '{planned.method.name}' cannot be merged")
        if getattr(base.model, "is_quantized", False):
            found.append(
                "the base keeps weights that another library quantized, and folding would round them anew"
            )
        return found

    def write(
        self,
        base: LoadedBase,
        handle: Handle,
        folder: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Parity:
        kind = None if dtype is None else getattr(torch, dtype)
        return export_merged(base, handle, folder, dtype=kind, provenance=provenance, on_progress=on_progress)


FORMAT = Merged()
