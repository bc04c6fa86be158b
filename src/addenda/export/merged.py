"""A merged model: the adapter folded into the base's weights, as a model folder that transformers loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.bases import LoadedBase, load_base
from addenda.bases.model_config import quiet_transformers
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ExportError
from addenda.export.card import model_card
from addenda.export.folder import new_folder, write_record
from addenda.export.parity import Parity, logits_of, probe_rows, require_parity

__all__ = ["export_merged"]

_USAGE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")
"""


def export_merged(
    base: LoadedBase,
    handle: Handle,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Parity:
    """Write base and adapter as one model folder: safetensors, tokenizer, chat template, card, ``export.json``.

    The weights are folded in float32 and rounded once to ``dtype``. The folder is loaded again and must answer like
    the adapted model before it appears under its name. The model in memory stays as it was.

    Args:
        base: the loaded base, best in float32, carrying the adapter.
        handle: the adapter.
        folder: the new folder; must not exist, or be empty.
        dtype: of the written weights; None keeps that of the model in memory.
        provenance: what the adapter's manifest says of its training.
        on_progress: told of the steps.

    Raises:
        MethodError: the method cannot be merged, or a weight is shared with another layer.
        ExportError: the architecture has no place for a merged weight, or the export answers otherwise.
        BusyError: the folder exists and is not empty.
    """
    kind = dtype or base.model.dtype
    name = str(kind).removeprefix("torch.")
    facts = dict(provenance or {})
    with new_folder(folder) as work:
        rows = probe_rows(base)
        wanted = logits_of(base.model, rows, on_progress=on_progress)
        _say(on_progress, 0)
        _write_weights(base, handle, work, kind)
        _say(on_progress, 1)
        base.tokenizer.save_pretrained(work)
        again = load_base(work, dtype=torch.float32)
        found = logits_of(again.model, rows, on_progress=on_progress)
        parity = require_parity(wanted, found, reader="transformers", dtype=name)
        write_record(work, form="merged", parity=parity, provenance=facts)
        title = f"{base.name} with '{handle.name}' merged"
        tags = ["addenda", handle.method.name]
        card = model_card(
            title=title, library="transformers", tags=tags, usage=_USAGE, provenance=facts, parity=parity
        )
        (work / "README.md").write_text(card, encoding="utf-8")
    return parity


def _say(on_progress: OnProgress | None, done: int) -> None:
    if on_progress:
        on_progress(Progress("write the merged weights", done, 1, "models"))


def _write_weights(base: LoadedBase, handle: Handle, work: Path, dtype: torch.dtype) -> None:
    before = _own_keys(base.model.state_dict(), handle)
    handle.merge()
    try:
        state = base.model.state_dict()
        keys = _own_keys(state, handle)
        new = [key for key in keys if key not in set(before)]
        if new:
            raise ExportError(
                f"merging gives {type(base.model).__name__} {len(new)} weights it has no place for, first '{new[0]}'",
                hint="the architecture has no biases there; keep the adapter beside its base",
            )
        with quiet_transformers():
            base.model.save_pretrained(work, state_dict=_rounded({key: state[key] for key in keys}, dtype))
    finally:
        handle.unmerge()
    config = work / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _own_keys(state: Mapping[str, Tensor], handle: Handle) -> list[str]:
    """The base's own tensors, without those of any adapter."""
    inside = tuple(f"{path}.adapters." for path in handle.paths)
    return [key for key in state if not key.startswith(inside)]


def _rounded(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Round floating tensors to ``dtype``; tensors that share memory go on sharing it, so that ties are kept."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    rounded = {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in made:
            made[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        rounded[key] = made[place]
    return rounded
