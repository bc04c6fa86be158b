"""The host: a layer whose class was swapped in place so that it runs its adapters.

The layer object, its place in the model, its parameters and their names stay as they were; only its class becomes a
subclass of its own class, and its adapters live under ``<layer>.adapters.<name>``. Taking the last adapter off gives
the class back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.parts import Part, adapted_class
from addenda.core.views import LayerView
from addenda.errors import MethodError, TargetError

__all__ = [
    "Host",
    "HostState",
    "adapter_prefixes",
    "count_call",
    "fold",
    "host_of",
    "install",
    "remove",
    "require_module",
    "sole_adapter",
]


class HostState:
    """What a host knows beside its parameters."""

    def __init__(self, view: LayerView) -> None:
        self.view = view
        self.active: list[str] = []
        """Names of the adapters that run, in the order in which they were attached."""
        self.merged: list[str] = []
        """Names of the adapters folded into the weight, in the order of folding."""
        self.kept: tuple[Tensor, Tensor | None] | None = None
        """The weight and bias as they were before the first fold."""
        self.calls: dict[str, int] = {}
        """How often each adapter ran since the count was last cleared."""


class Host:
    """Mixed in before the layer's own class; ``original_class`` is that class."""

    original_class: type[nn.Module]
    _addenda: HostState
    adapters: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with its active adapters; arguments as the layer's own."""
        state = self._addenda
        if not state.active:
            return self.original_class.forward(cast(nn.Module, self), *args, **kwargs)
        x, *rest = args if args else (kwargs.pop(state.view.input_name),)
        return _run(self, _bound(state.view, tuple(rest), kwargs), x)


def _bound(view: LayerView, args: tuple[object, ...], kwargs: dict[str, object]) -> LayerView:
    if not args and not kwargs:
        return view
    bound = copy.copy(view)
    bound.args, bound.kwargs = args, kwargs
    return bound


def _run(host: Host, base: Base, x: Tensor) -> Tensor:
    state = host._addenda
    *inner, last = [cast(Adapter, host.adapters[name]) for name in state.active]
    for adapter in inner:
        base = cast(Base, _Stacked(base, adapter))
    count_call(host)
    y: Tensor = last(x, base)
    return y


class _Stacked:
    """A base with an adapter already on it: calling it runs both, everything else is the bare layer's."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._adapter(x, self._base)
        return y

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return Base.add_low_rank(cast(Base, self), x, A, B, scaling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _noop_hook(module: nn.Module, args: object, output: object) -> None:
    """Present only so that PyTorch's fused inference paths, which read weights and call no layer, stay off."""


def require_module(model: object) -> None:
    """Refuse what is no module, before anything is looked up on it.

    Raises:
        TargetError: it is something else.
    """
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        raise TargetError(
            f"a model is a torch.nn.Module, not a {type(model).__name__}",
            hint="give its attribute 'model'" if inner else "give the module itself",
        )


def host_of(module: nn.Module) -> Host | None:
    """Return the module as a host, or None where it carries no adapter."""
    return module if isinstance(module, Host) else None


def sole_adapter(host: Host) -> Adapter | None:
    """Return the one adapter that runs on a layer, or None where none or several do."""
    active = host._addenda.active
    return cast(Adapter, host.adapters[active[0]]) if len(active) == 1 else None


def fold(view: LayerView, adapters: Iterable[Adapter]) -> tuple[Tensor, Tensor | None]:
    """Return the layer's (d_out, d_in) weight and its bias with adapters folded in, one after another.

    It is done in float32 at least, whatever the layer's dtype, and rounded once.

    Raises:
        MethodError: an adapter cannot be folded, or gives a bias for which the layer has no place.
    """
    wide = torch.promote_types(view.dtype, torch.float32)
    weight, bias = view.weight().to(wide), view.bias()
    bias = None if bias is None else bias.to(wide)
    for adapter in adapters:
        weight, bias = adapter.fold(weight, bias)
    if bias is not None and view.bias_place() is None:
        raise MethodError(
            f"the adapter on '{view.path}' folds into a bias, for which its module has no place",
            hint="leave the layer out of the targets, or keep the adapter beside its base",
        )
    return weight.to(view.dtype), None if bias is None else bias.to(view.dtype)


def count_call(host: Host | None) -> None:
    """Note that the adapters of a layer ran, where something other than the layer ran them."""
    if host is not None and not torch.compiler.is_compiling():
        calls = host._addenda.calls
        for name in host._addenda.active:
            calls[name] = calls.get(name, 0) + 1


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of all adapter parameters on the model start with; a shared layer has several names."""
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if host_of(module)]
    return tuple(f"{path}.adapters." if path else "adapters." for path in paths)


def install(module: nn.Module, view: LayerView, name: str, adapter: Adapter) -> None:
    """Put an adapter on a layer and make it active, swapping the layer's class if it is the first."""
    if not isinstance(module, Host):
        if isinstance(module, Part):
            module.join()
        module.__class__ = adapted_class(type(module), Host)
        module.adapters = nn.ModuleDict()
        object.__setattr__(module, "_addenda", HostState(view))
        handle = module.register_forward_hook(_noop_hook)
        object.__setattr__(module, "_addenda_hook", handle)
    host = cast(Host, module)
    host.adapters[name] = adapter.train(module.training)
    host._addenda.active.append(name)


def remove(module: nn.Module, name: str) -> None:
    """Take an adapter off a layer; the last one to go gives the layer its class back."""
    host = cast(Host, module)
    del host.adapters[name]
    if name in host._addenda.active:
        host._addenda.active.remove(name)
    if len(host.adapters) == 0:
        cast(Any, module)._addenda_hook.remove()
        del module.adapters
        object.__delattr__(module, "_addenda")
        object.__delattr__(module, "_addenda_hook")
        module.__class__ = host.original_class
        if isinstance(module, Part):
            module.leave()
