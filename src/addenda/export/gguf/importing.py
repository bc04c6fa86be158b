"""Taking in a GGUF adapter that somebody else made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from addenda.bases import LoadedBase
from addenda.bases.gguf_header import read_header
from addenda.core.attaching import attach_paths
from addenda.core.handle import Handle
from addenda.core.planning import require_possible
from addenda.core.targets import exact
from addenda.errors import CheckpointError
from addenda.export.gguf.adapter import BASE_NAME, read_adapter
from addenda.export.gguf.factors import Factors
from addenda.export.gguf.origin import origin_of
from addenda.methods.lora import LoRA

__all__ = ["base_of", "import_gguf"]


def base_of(file: Path) -> str | None:
    """Return the name of the base that an adapter file gives, if it gives one."""
    name = read_header(file).metadata.get(BASE_NAME)
    return name if isinstance(name, str) else None


def import_gguf(base: LoadedBase, file: Path, *, name: str = "default") -> Handle:
    """Attach a GGUF adapter; it answers as in llama.cpp, and is frozen like any loaded adapter.

    Args:
        base: the base it was made for, loaded from its GGUF file or from a folder that has a GGUF form.
        file: as ``addenda export --to gguf-lora`` or llama.cpp's own converter writes it.
        name: the adapter's name on the model.

    Raises:
        CheckpointError: it is no LoRA adapter, or does not fit the base; the model is then as it was.
        ExportError: the base has no GGUF form.
    """
    factors = read_adapter(file, origin_of(base))
    if not factors or not all(
        bool(t.isfinite().all()) for each in factors.values() for t in (each.A, each.B)
    ):
        raise CheckpointError(
            "the adapter holds numbers that are not finite" if factors else "the adapter holds no tensor",
            where={"file": file},
            hint="make it anew",
        )
    method = _method(factors)
    layers = exact(base.model, list(factors), lambda kind: kind.why_not(method))
    require_possible(method, layers)
    handle = attach_paths(base.model, method, list(layers), name=name, fill=lambda made: _fill(made, factors))
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    return handle


def _method(factors: Mapping[str, Factors]) -> LoRA:
    rank = Counter(len(each.A) for each in factors.values()).most_common(1)[0][0]
    alpha = Counter(each.alpha for each in factors.values()).most_common(1)[0][0]
    # A path may be the end of another one, which then has to come later: the last that matches counts.
    paths = sorted(factors, key=len)
    return LoRA(
        rank=rank,
        alpha=alpha,
        ranks={path: len(factors[path].A) for path in paths if len(factors[path].A) != rank},
        alphas={path: factors[path].alpha for path in paths if factors[path].alpha != alpha},
    )


def _fill(handle: Handle, factors: Mapping[str, Factors]) -> None:
    for path, adapter in handle.adapters.items():
        held = cast(Any, adapter)
        with torch.no_grad():
            held.A.copy_(factors[path].A)
            held.B.copy_(factors[path].B)
