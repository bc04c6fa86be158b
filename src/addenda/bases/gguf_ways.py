"""Which tensor of a GGUF file is which weight of the model that was made from it, and how its rows are ordered there.

Nothing of this is known here: it is learnt from what transformers does to a tensor on the way to the model, by sending
row numbers that way. So it holds for every architecture that transformers reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from addenda.bases.gguf_header import read_header
from addenda.bases.gguf_pack import Process, transformers_ways

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Way", "ways_of"]


@dataclass(frozen=True)
class Way:
    """How one tensor of the file becomes one weight of the model."""

    tensor: str
    """Its name in the file."""
    order: Tensor | None
    """Row i of the weight is row ``order[i]`` of the tensor; None where the order is the same."""
    offset: float = 0.0
    """Added to the tensor's numbers on the way."""

    def back(self, weight: Tensor) -> Tensor:
        """Return the tensor that becomes ``weight``; also of a matrix with as many rows, such as a factor of a change.

        Example:
            >>> Way("t", torch.tensor([1, 0])).back(torch.tensor([[1.0], [2.0]])).tolist()
            [[2.0], [1.0]]
        """
        ordered = weight
        if self.order is not None:
            ordered = torch.empty_like(weight)
            ordered[self.order] = weight
        return ordered - self.offset if self.offset else ordered

    def there(self, tensor: Tensor) -> Tensor:
        """Return the weight that a tensor becomes."""
        ordered = tensor if self.order is None else tensor[self.order]
        return ordered + self.offset if self.offset else ordered


def ways_of(path: Path, config: PreTrainedConfig) -> Mapping[str, Way]:
    """Return the ways of a file's tensors, by the parameters' names in the model.

    Tensors that are split, stacked or changed otherwise on the way have none.

    Args:
        path: a GGUF file that `addenda.bases.load_base` reads.
        config: of the model that was made from it.
    """
    from transformers import AutoModelForCausalLM

    from addenda.bases.empty import empty_model

    header = read_header(path)
    model = empty_model(AutoModelForCausalLM, config, torch.float32)
    names, process_of = transformers_ways(header.architecture, model, config.to_dict())
    found = {}
    for tensor in header.tensors:
        name = names.get(tensor.name)
        way = None if name is None else _learnt(tensor.name, tensor.shape, process_of(tensor.name))
        if name is not None and way is not None:
            found[name] = way
    return found


def _learnt(name: str, shape: tuple[int, ...], process: Process) -> Way | None:
    rows = np.arange(shape[0], dtype=np.float64)
    sent = rows if len(shape) == 1 else rows[:, None]
    came = process(sent.copy())
    if came is None or came.shape != sent.shape:
        return None
    offset = float(came.min())
    order = came.reshape(-1) - offset
    if not np.array_equal(np.sort(order), rows):
        return None
    same = np.array_equal(order, rows)
    return Way(name, None if same else torch.from_numpy(order.copy()).long(), offset)
