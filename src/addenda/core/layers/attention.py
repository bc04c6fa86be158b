"""``nn.MultiheadAttention``: its four projections, packed or separate, are read and never called."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from addenda.core.layers.folded import FoldedHolder, FoldedView
from addenda.core.layers.kind import LayerKind
from addenda.core.parts import Part, Place

__all__ = ["PROJECTION", "AttentionPart"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class AttentionPart(Part):
    """One projection: ``q_proj``, ``k_proj``, ``v_proj`` or ``out_proj``."""

    holder = FoldedHolder

    @classmethod
    def held_by(cls, module: nn.Module) -> bool:
        """Whether the module is an attention that keeps its weights as PyTorch's own does."""
        if not isinstance(module, nn.MultiheadAttention):
            return False
        weights = [cls.of(module, name).weight_at.parameter for name in _PROJECTIONS]
        return all(weight is not None and weight.is_floating_point() for weight in weights)

    @classmethod
    def names(cls, module: nn.Module) -> list[str]:
        """Return the names of the projections."""
        return list(_PROJECTIONS)

    @classmethod
    def of(cls, module: Any, name: str) -> Self:
        """Make the part of this projection."""
        if name == "out_proj":
            bias = Place(module.out_proj, "bias") if module.out_proj.bias is not None else None
            return cls(module, name, Place(module.out_proj, "weight"), bias)
        place, width = _PROJECTIONS.index(name), module.embed_dim
        rows = slice(place * width, (place + 1) * width)
        packed = Place(module, "in_proj_weight", rows)
        weight = packed if module._qkv_same_embed_dim else Place(module, f"{name}_weight")
        return cls(
            module,
            name,
            weight,
            Place(module, "in_proj_bias", rows) if module.in_proj_bias is not None else None,
        )


class _ProjectionView(FoldedView):
    kind = "projection"


PROJECTION = LayerKind(
    "projection", lambda m: isinstance(m, AttentionPart), _ProjectionView, linear=True, stands_for="linear"
)
