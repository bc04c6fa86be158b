"""Tensors that need not be kept for the backward, because what is kept anyway makes them again.

The output of a norm or of an activation is kept twice by autograd's count: the layer that made it keeps its own input,
the layer that reads it keeps the output. One pass over the first gives the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Remade", "kept", "remade_of", "remakable"]


@dataclass(frozen=True)
class Remade:
    """How a tensor comes out of others that are kept anyway."""

    make: Callable[..., Tensor]
    """From the detached tensors, the same bits again."""
    tensors: tuple[Tensor, ...]
    version: int = 0
    """How often the tensor had been written to when it was marked."""


def remakable(y: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Mark ``y`` as what ``make(*tensors)`` gives, so that a node which needs it later need not keep it."""
    y.remade = Remade(make, tuple(t.detach() for t in tensors), y._version)  # type: ignore[attr-defined]
    return y


def remade_of(x: Tensor) -> Remade | None:
    """Return how ``x`` can be made again, or None where it has to be kept (or was written to since it was marked)."""
    remade: Remade | None = getattr(x, "remade", None)
    return remade if remade is not None and remade.version == x._version else None


def kept(x: Tensor) -> Remade:
    """Return what to keep so as to have ``x`` in the backward."""
    return remade_of(x) or Remade(_itself, (x.detach(),))


def _itself(x: Tensor) -> Tensor:
    return x
