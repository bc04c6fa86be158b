"""The GGUF file of a base that came without one: written once, and kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from addenda.bases import LoadedBase
from addenda.bases.cache import cache_root, locked, require_space, staged, sweep
from addenda.bases.gguf_ways import Stack, Way
from addenda.bases.loaded import vocabulary_of
from addenda.core.fingerprints import fingerprint
from addenda.core.packed_layers import packed_numel
from addenda.core.progress import OnProgress
from addenda.errors import ExportError
from addenda.export.gguf.layout import Layout, layout_of
from addenda.export.gguf.tokenizer import tokenizer_keys
from addenda.export.gguf.writing import write_base
from addenda.export.own import OwnTensors, narrowest

__all__ = ["made_gguf", "ways_by_layout", "why_not_made"]

_VERSION = 2
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


def ways_by_layout(base: LoadedBase) -> tuple[Mapping[str, Way], Mapping[str, Stack]]:
    """Return how the file's tensors become the model's parameters, as `addenda.bases.gguf_ways.ways_of` does."""
    layout = layout_of(base.model.config)
    ways: dict[str, Way] = {}
    stacks: dict[str, Stack] = {}
    for name, tensor in OwnTensors(base.model).items():
        if len(tensor.shape) == 3:
            stacks |= {stack.tensor: stack for stack in _stacks(layout, name, tensor.shape)}
        elif way := _way(layout, name, tensor.shape):
            ways[name] = way
    return ways, stacks


def _way(layout: Layout, name: str, shape: torch.Size) -> Way | None:
    """Learnt by sending row numbers; transposed matrices have none."""
    rows = torch.arange(shape[0], dtype=torch.float32)
    sent = layout.tensors(name, rows if len(shape) == 1 else rows[:, None])
    if not sent:
        return None
    ((tensor, came),) = sent.items()
    if len(came) != len(rows):
        return None
    offset = float(came.min())
    order = (came.flatten() - offset).argsort()
    return Way(tensor, None if torch.equal(order, rows.long()) else order, -offset)


def _stacks(layout: Layout, name: str, shape: torch.Size) -> Iterator[Stack]:
    """Learnt by sending numbers that tell expert and row."""
    sent = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1)
    for tensor, came in layout.tensors(name, sent).items():
        first = int(came[0, 0])
        rows = slice(first, first + came.shape[1])
        if torch.equal(came, sent[:, rows]):
            yield Stack(tensor, name, rows)
