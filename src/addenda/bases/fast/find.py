"""The tables of parts that have a leaner form, and the search for them in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from addenda.bases.fast.fusion import Fusion, Unproven
from addenda.bases.fast.gated_mlp import gated_mlp
from addenda.bases.fast.padding import unpadded
from addenda.bases.fast.projections import projections
from addenda.bases.fast.remade import activation, layer_norm
from addenda.bases.fast.rms_norm import rms_norm
from addenda.bases.fast.self_attention import own_attention, self_attention

__all__ = ["IN_BATCHES", "IN_PACKED_ROWS", "WITHOUT_PADDING", "Found", "Recogniser", "find_fusions"]

Recogniser = Callable[[nn.Module, Tensor], Fusion | Unproven | None]
"""Looks at one module, with a tensor of the model's dtype and device: gives a proven lean form, or says why a module
that looks like a known part is none, or gives None."""

IN_PACKED_ROWS: tuple[Recogniser, ...] = (rms_norm, layer_norm, gated_mlp, activation, self_attention)
"""Parts of a causal model that runs over packed rows."""

IN_BATCHES: tuple[Recogniser, ...] = (rms_norm, layer_norm, gated_mlp, activation, own_attention, projections)
"""Parts of any model, called in any way."""

WITHOUT_PADDING: tuple[Recogniser, ...] = (unpadded,)
"""Stacks whose states at padding may be zero instead."""


class Found(NamedTuple):
    """What a search found."""

    fusions: tuple[Fusion, ...] = ()
    unproven: tuple[Unproven, ...] = ()

    @property
    def fused(self) -> tuple[tuple[str, int], ...]:
        """Kinds of parts that have a proven leaner form, and how many of each."""
        return tuple(sorted(Counter(fusion.kind for fusion in self.fusions).items()))

    @property
    def unfused(self) -> tuple[tuple[str, str, int], ...]:
        """Kinds of parts that run as they are though they look like known ones, why, and how many of each."""
        counted = Counter((part.kind, part.reason) for part in self.unproven)
        return tuple((kind, reason, count) for (kind, reason), count in sorted(counted.items()))

    @property
    def parts(self) -> str:
        """Both in words."""
        fused = ", ".join(f"{count} {kind}" for kind, count in self.fused) or "none"
        own = "".join(f"; {count} {kind} not: {reason}" for kind, reason, count in self.unfused)
        return f"fused parts: {fused}{own}"


def find_fusions(model: nn.Module, recognisers: Sequence[Recogniser] = IN_PACKED_ROWS) -> Found:
    """Return what of `model` has a proven leaner form, and what only looks as if it had.

    Example:
        >>> from torch import nn
        >>> found = find_fusions(nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8)))
        >>> found.fused, found.unproven
        ((('RMS norm', 1),), ())
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None or like.is_meta:
        return Found()
    fusions: list[Fusion] = []
    unproven: list[Unproven] = []
    covered: set[nn.Module] = set()
    for module in model.modules():
        for recognise in recognisers if module not in covered else ():
            found = recognise(module, like)
            if isinstance(found, Fusion):
                fusions.append(found)
                covered.update(found.covers)
                break
            if found is not None:
                unproven.append(found)
    return Found(tuple(fusions), tuple(unproven))
