"""What attention over a packed row is told: where the samples lie, how scores become weights, and the positions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from addenda.bases.fast.compiled import compiled_on_gpu

__all__ = ["Rotary", "Rule", "Segments", "turned"]


@dataclass
class Segments:
    """Where the samples of a packed row lie; goes through the model's forward as the argument ``segments``.

    Example:
        >>> Segments((3, 2)).bounds
        ((0, 3), (3, 5))
    """

    lengths: tuple[int, ...]
    """Tokens of each sample, in order; all positive. Tokens of the row behind them belong to no sample."""
    prompts: tuple[int, ...] | None = None
    """Tokens of each sample's prompt, for adapters that act on it; None where all of it is one."""
    windows: set[int | None] = field(default_factory=set)
    """Sliding windows the layers asked for, collected while they ran."""
    masks: dict[tuple[int, int | None, bool], Any] = field(default_factory=dict)
    """What attention on a GPU has worked out for the layers: by the row's tokens, the window and the direction."""

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each sample in the row."""
        ends = tuple(itertools.accumulate(self.lengths))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))


@dataclass(frozen=True)
class Rule:
    """How scores become probabilities in one layer."""

    scaling: float
    """Factor on the products of queries and keys."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` before it; None for no limit."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(scores / softcap)``; None leaves them."""
    causal: bool = True
    """Whether a token sees only itself and those before it."""


Rotary = tuple[Tensor, Tensor]
"""cos and sin, ``(T, width)`` each: the first ``width`` (even) numbers of queries and keys are turned by them. A number
``x`` and the one half the width behind it, ``y``, become ``x cos - y sin`` and ``y cos + x sin`` (arXiv:2104.09864)."""


@compiled_on_gpu
def turned(x: Tensor, rotary: Rotary, *, back: bool = False) -> Tensor:
    """x: (heads, T, d) -> the same with positions; `back` turns the other way, which is the transpose."""
    cos, sin = rotary
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    made = part * cos - _half_turned(part * sin) if back else part * cos + _half_turned(part) * sin
    return made if not rest.shape[-1] else torch.cat((made, rest), dim=-1)


def _half_turned(x: Tensor) -> Tensor:
    x, y = x.chunk(2, dim=-1)
    return torch.cat((-y, x), dim=-1)
