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

__all__ = ["Stack", "Way", "ways_of"]


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


@dataclass(frozen=True)
class Stack:
    """How one tensor of the file becomes some rows of every expert's weight, in a parameter that stacks all experts."""

    tensor: str
    """Its name in the file, where it is (experts, rows, d_in)."""
    parameter: str
    """(experts, d_out, d_in), e.g. ``model.layers.0.mlp.experts.gate_up_proj``."""
    rows: slice
    """Which of the d_out rows: all of them, or the half that gates, or the half that is gated."""

    def path(self, expert: int) -> str:
        """Return what the adapted layer is called that is this projection of one expert.

        Example:
            >>> Stack("blk.0.ffn_up_exps.weight", "mlp.experts.gate_up_proj", slice(96, 192)).path(3)
            'mlp.experts.3.gate_up_proj'
        """
        holder, _, projection = self.parameter.rpartition(".")
        return f"{holder}.{expert}.{projection}"


def ways_of(path: Path, config: PreTrainedConfig) -> tuple[Mapping[str, Way], Mapping[str, Stack]]:
    """Return the ways of a file's tensors by the parameters' names in the model, and its stacks by the tensors' names.

    Tensors that are changed otherwise on the way have none.

    Args:
        path: a GGUF file that `addenda.bases.load_base` reads.
        config: of the model that was made from it.
    """
    from transformers import AutoModelForCausalLM

    from addenda.bases.empty import empty_model

    header = read_header(path)
    model = empty_model(AutoModelForCausalLM, config, torch.float32)
    names, process_of = transformers_ways(header.architecture, model, config.to_dict())
    ways: dict[str, Way] = {}
    stacks: dict[str, Stack] = {}
    for tensor in header.tensors:
        # transformers knows stacked experts without the last part of their name.
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            continue
        process = process_of(tensor.name)
        if len(tensor.shape) == 3:
            if stack := _learnt_stack(tensor.name, name, tensor.shape, process):
                stacks[tensor.name] = stack
        elif way := _learnt(tensor.name, tensor.shape, process):
            ways[name] = way
    return ways, stacks


def _learnt(name: str, shape: tuple[int, ...], process: Process) -> Way | None:
    rows = np.arange(shape[0], dtype=np.float64)
    sent = rows if len(shape) == 1 else rows[:, None]
    came = process(sent.copy())
    if came is None or came.size != sent.size:
        return None
    offset = float(came.min())
    order = came.reshape(-1) - offset
    if not np.array_equal(np.sort(order), rows):
        return None
    same = np.array_equal(order, rows)
    return Way(name, None if same else torch.from_numpy(order.copy()).long(), offset)


def _learnt_stack(name: str, parameter: str, shape: tuple[int, ...], process: Process) -> Stack | None:
    """Learnt by sending numbers that tell expert and row; elsewhere in the parameter zeros come back."""
    sent = np.arange(1.0, shape[0] * shape[1] + 1).reshape(*shape[:2], 1)
    came = process(sent.copy())
    if came is None or came.ndim != 3 or len(came) != len(sent):
        return None
    first = int(np.flatnonzero(came[0])[0])
    rows = slice(first, first + shape[1])
    expected = np.zeros_like(came)
    expected[:, rows] = sent
    return Stack(name, parameter, rows) if np.array_equal(came, expected) else None
