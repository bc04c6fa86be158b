"""Rows of a task, read as training data is, for an export that rounds by them."""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases import LoadedBase
from addenda.recipe.prepare import OnRunEvent, encode_all, prepare_data
from addenda.settings import DataSettings

__all__ = ["calibration_rows"]

_ROWS = 64


def calibration_rows(path: str, base: LoadedBase, on_event: OnRunEvent) -> list[dict[str, Tensor]]:
    """Return the first rows of a data file as token ids, as they would be trained on.

    Args:
        path: of the data, in any shape that ``addenda train`` takes.
        base: whose template and tokenizer write them.
        on_event: told of progress and notes.

    Raises:
        DataError: a row cannot be read.
    """
    settings = DataSettings(path)
    rows = encode_all(prepare_data(settings, on_event), base, settings, on_event).examples
    few = [rows[index].input_ids[: base.room] for index in range(min(_ROWS, len(rows)))]
    return [{"input_ids": torch.tensor([ids])} for ids in few]
