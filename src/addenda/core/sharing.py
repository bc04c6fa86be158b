"""Several layers on one input, each frozen or with low-rank adapters: run as one node where that is all they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from addenda.core.composition import Stack
from addenda.core.contract import Adapter
from addenda.core.host import Host, compositions_on, count_call
from addenda.core.packed_layers import PackedLinear, PackedView
from addenda.core.terms import Term, linear_with_terms
from addenda.core.through import Through
from addenda.core.views import LinearView

__all__ = ["shared_linear", "term_of"]


def term_of(module: nn.Module, x: Tensor) -> Term | None:
    """Return what the layer computes for ``x`` as a term, or None where only calling it would do the same."""
    view = module._addenda.view if isinstance(module, Host) else _plain_view(module)
    if not isinstance(view, LinearView) or not view.fusible(x) or _is_watched(module):
        return None
    if not isinstance(module, Host):
        return Term(view)
    acting = compositions_on(module)
    if not acting:
        return Term(view, host=module)
    if len(acting) > 1:
        return None
    adapters = cast(Mapping[str, Adapter], module.adapters)
    alone = [adapters[name] for name in acting[0].names if name in adapters]
    if len(alone) == 1 and isinstance(alone[0], Through) and isinstance(acting[0], Stack):
        return alone[0].term(view, x, host=module)
    parts = acting[0].parts(adapters, x, view.path)
    return None if parts is None else Term(view, parts, host=module)


def _plain_view(module: nn.Module) -> LinearView | None:
    if type(module) is nn.Linear:
        # A tensor subclass, as of torchao, is a weight format whose own products are to be used.
        return LinearView(module, "") if type(module.weight) is nn.Parameter else None
    return PackedView(module, "") if isinstance(module, PackedLinear) else None


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else's hook wants to see the layer being called."""
    before = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    own = getattr(module, "_addenda_hook", None)
    after = [key for key in module._forward_hooks if own is None or key != own.id]
    return bool(before or after or "forward" in vars(module))


def shared_linear(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Return what each of the layers gives for ``x``, in one node where all of them are frozen or low-rank adapted.

    Args:
        modules: layers of the same input width; hosts, or plain layers.
        x: ``(..., d_in)``.

    Returns:
        ``(..., d_out)`` of each layer.
    """
    terms = [term_of(module, x) for module in modules]
    found = [term for term in terms if term is not None]
    if len(found) < len(terms):
        return tuple(module(x) for module in modules)
    for term in found:
        count_call(term.host)
    return linear_with_terms(x, found)
