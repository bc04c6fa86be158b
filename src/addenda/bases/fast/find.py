"""The table of parts that have a leaner form, and the search for them in a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from addenda.bases.fast.fusion import Fusion, Unproven
from addenda.bases.fast.gated_mlp import gated_mlp
from addenda.bases.fast.rms_norm import rms_norm
from addenda.bases.fast.self_attention import self_attention

__all__ = ["RECOGNISERS", "find_fusions"]

RECOGNISERS: tuple[Callable[[nn.Module, Tensor], Fusion | Unproven | None], ...] = (
    rms_norm,
    gated_mlp,
    self_attention,
)
"""Each looks at one module, with a tensor of the model's dtype and device: it gives a proven lean form, or says why a
module that looks like a known part is none, or gives None."""


def find_fusions(model: nn.Module) -> tuple[tuple[Fusion, ...], tuple[Unproven, ...]]:
    """Return what of `model` has a proven leaner form, and what only looks as if it had.

    Example:
        >>> from torch import nn
        >>> fusions, unproven = find_fusions(nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.LayerNorm(8)))
        >>> [fusion.kind for fusion in fusions], unproven
        (['RMS norm'], ())
    """
    fusions: list[Fusion] = []
    unproven: list[Unproven] = []
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None or like.is_meta:
        return (), ()
    for module in model.modules():
        for recognise in RECOGNISERS:
            found = recognise(module, like)
            if isinstance(found, Fusion):
                fusions.append(found)
            elif found is not None:
                unproven.append(found)
    return tuple(fusions), tuple(unproven)
