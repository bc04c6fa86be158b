"""The table of layer kinds: which modules are of which kind, and how each kind is shown to a method.

A new kind is one class and one row; no method, and nothing of the life cycle, knows of it. A module that holds several
weights has no row itself: its parts have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from addenda.core.blocks import TransformerBlockView, is_transformer_block
from addenda.core.layers.attention import PROJECTION, AttentionPart
from addenda.core.layers.block import BLOCK
from addenda.core.layers.dense import DENSE
from addenda.core.layers.experts import EXPERT, ExpertPart
from addenda.core.layers.kind import LayerKind
from addenda.core.layers.recurrent import RECURRENT, RecurrentPart
from addenda.core.parts import Holder, Part
from addenda.core.transformer import AttentionView, TransformerView, is_attention, is_transformer
from addenda.core.views import LayerView
from addenda.errors import MethodError, TargetError

__all__ = ["KINDS", "LayerKind", "LayerView", "kind_of", "layer_at", "parts_of", "view_of"]

KINDS: tuple[LayerKind, ...] = (
    PROJECTION,
    RECURRENT,
    EXPERT,
    *DENSE,
    LayerKind("attention", is_attention, AttentionView),
    BLOCK,
    LayerKind("transformer", is_transformer, TransformerView),
    LayerKind("transformer-block", is_transformer_block, TransformerBlockView),
)
"""Every kind of layer that can be adapted; the first row that matches a module is its kind."""

_PARTS: tuple[type[Part], ...] = (AttentionPart, RecurrentPart, ExpertPart)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the module's kind, or None where it cannot be adapted.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3)).name
        'conv'
    """
    state = getattr(module, "_addenda", None)
    if state is not None:  # adapters inside must not change what the layer is
        return next(k for k in KINDS if k.name == state.view.kind)
    return next((k for k in KINDS if k.matches(module)), None)


def parts_of(module: nn.Module) -> dict[str, Part]:
    """Return the weights of a module that holds several, each as a layer; of any other module there are none.

    Example:
        >>> list(parts_of(nn.GRU(4, 8)))
        ['weight_ih_l0', 'weight_hh_l0']
    """
    family = _family(module)
    return {} if family is None else {name: _part(module, family, name) for name in family.names(module)}


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, or the part of one.

    Raises:
        TargetError: there is none.

    Example:
        >>> layer_at(nn.Sequential(nn.LSTM(4, 8)), "0.weight_hh_l0").weight.shape
        torch.Size([32, 8])
    """
    module, names = model, path.split(".")
    for depth, name in enumerate(names):
        family, rest = _family(module), ".".join(names[depth:])
        if family is not None and rest in family.names(module):
            return _part(module, family, rest)
        child = module if path == "" else module._modules.get(name)
        if child is None:
            raise TargetError(f"the model has no layer '{path}'", hint="name a layer that the model has")
        module = child
    return module


def _family(module: nn.Module) -> type[Part] | None:
    return next((family for family in _PARTS if family.held_by(module)), None)


def _part(module: nn.Module, family: type[Part], name: str) -> Part:
    """Return the part that carries adapters already, or a new one."""
    made = family.of(module, name)
    if isinstance(module, Holder) and made.key in module.adapted_parts:
        carrying = module.adapted_parts[made.key]
        assert isinstance(carrying, Part)
        return carrying
    return made


def view_of(module: nn.Module, path: str, **settings: Any) -> LayerView:
    """Return the module as a method sees it.

    Args:
        module: a layer.
        path: where it is in its model.
        settings: how an adapter's tensors are made on it, as for `addenda.core.contract.Base`.

    Raises:
        MethodError: the module is of no known kind.
    """
    kind = kind_of(module)
    if kind is None:
        raise MethodError(
            f"'{path}' is a {type(module).__name__}, which is of no known layer kind",
            where={"kinds": " ".join(k.name for k in KINDS)},
            hint="a new kind is one class and one row in addenda/core/layers",
        )
    return kind.view(module, path, **settings)
