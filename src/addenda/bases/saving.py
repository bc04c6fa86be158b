"""A model's folder as transformers writes it: its settings, and what it calls the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.bases.model_config import quiet_transformers

__all__ = ["alone", "keeps_names", "write_settings", "write_whole"]


def write_settings(model: Any, folder: Path) -> None:
    """Write ``config.json`` and, of a model that generates, ``generation_config.json``."""
    write_whole(model, folder, {})


def write_whole(model: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write settings and tensors, renamed and regrouped as the architecture's files have them, all in memory."""
    stored = model.config.dtype
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=dict(state))
    finally:  # else the configuration in memory says what the numbers were widened to
        model.config.dtype = stored


def alone(model: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Return the names under which a folder holds these tensors: one of those that share memory, none that is derived.

    Args:
        model: a model of transformers.
        state: its tensors by name.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    left_out = set(model._keys_to_ignore_on_save or ())
    return list(
        remove_tied_weights_from_state_dict({n: t for n, t in state.items() if n not in left_out}, model)
    )


def keeps_names(model: Any, state: Mapping[str, Tensor]) -> bool:
    """Whether a folder of the architecture holds each of these tensors by itself, under the name that it has here."""
    from transformers.core_model_loading import revert_weight_conversion

    sketch = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    written = revert_weight_conversion(model, dict(sketch))
    return {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in sketch.items()}
