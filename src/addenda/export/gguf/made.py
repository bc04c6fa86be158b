"""The GGUF file of a base that came without one: written once, and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from addenda.bases import LoadedBase
from addenda.bases.cache import cache_root, locked, require_space, staged, sweep
from addenda.bases.gguf_ways import Way
from addenda.bases.loaded import vocabulary_of
from addenda.core.fingerprints import fingerprint
from addenda.core.packed_layers import packed_numel
from addenda.core.progress import OnProgress
from addenda.errors import ExportError
from addenda.export.gguf.layout import Layout, layout_of
from addenda.export.gguf.own import OwnTensors, narrowest
from addenda.export.gguf.tokenizer import tokenizer_keys
from addenda.export.gguf.writing import write_base

__all__ = ["made_gguf", "ways_by_layout", "why_not_made"]

_VERSION = 1
"""Part of the folder's name: raised whenever another file would be written."""


def why_not_made(base: LoadedBase) -> str:
    """Return why no GGUF file can be written of a base, or ""."""
    try:
        layout_of(base.model.config)
        tokenizer_keys(base.tokenizer, vocabulary_of(base.model))
    except ExportError as error:
        return error.message
    return ""


def made_gguf(base: LoadedBase, *, on_progress: OnProgress | None = None) -> Path:
    """Return a GGUF file of the base, which holds its weights exactly.

    Raises:
        ExportError: llama.cpp would not run the model as it is.
        DiskFullError: there is no room.
    """
    root, digest = cache_root(), fingerprint(base.model).rpartition("-")[2]
    label = base.name.replace("/", "--")
    folder = root / "gguf" / f"{label}-{digest[:12]}-v{_VERSION}"
    if not folder.is_dir():
        with locked(root, label, on_progress):
            if not folder.is_dir():  # another process may have made it while we waited
                sweep(folder.parent, label)
                state = OwnTensors(base.model)
                numbers = base.model.num_parameters() + packed_numel(base.model)
                require_space(folder.parent, 4 * numbers + 2**26)
                with staged(folder, label=label) as work:
                    kind = narrowest(state)
                    write_base(base, work / "model.gguf", kind=kind, state=state, on_progress=on_progress)
    return folder / "model.gguf"


def ways_by_layout(base: LoadedBase) -> Mapping[str, Way]:
    """Return how the file's tensors become the model's parameters, by their names; of those that stand for one each."""
    layout = layout_of(base.model.config)
    found = {}
    for name, tensor in OwnTensors(base.model).items():
        way = _way(layout, name, tensor.shape)
        if way is not None:
            found[name] = way
    return found


def _way(layout: Layout, name: str, shape: torch.Size) -> Way | None:
    """Learnt by sending row numbers; stacked experts and transposed matrices have none."""
    rows = torch.arange(shape[0], dtype=torch.float32)
    sent = layout.tensors(name, rows if len(shape) == 1 else rows[:, None]) if len(shape) < 3 else {}
    if not sent:
        return None
    ((tensor, came),) = sent.items()
    if len(came) != len(rows):
        return None
    offset = float(came.min())
    order = (came.flatten() - offset).argsort()
    return Way(tensor, None if torch.equal(order, rows.long()) else order, -offset)
