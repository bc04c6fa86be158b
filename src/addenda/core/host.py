"""The host: a layer whose class was swapped in place so that it runs its adapters.

The layer object, its place in the model, its parameters and their names stay as they were; only its class becomes a
subclass of its own class, and its adapters live under ``<layer>.adapters.<name>``. Taking the last adapter off gives
the class back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from addenda.core.composition import Composition, Stack, Stacked
from addenda.core.contract import Adapter, Base
from addenda.core.parts import Part, adapted_class
from addenda.core.views import LayerView
from addenda.errors import MethodError, TargetError

__all__ = [
    "Host",
    "HostState",
    "PaddedEncoder",
    "Selection",
    "adapter_prefixes",
    "compositions_on",
    "count_call",
    "fold",
    "host_of",
    "install",
    "pad_encoders",
    "remove",
    "require_module",
    "running_on",
]


class Selection:
    """Which of the adapters attached through one model run; held by the model and by each of its hosts."""

    def __init__(self) -> None:
        self.composition: Composition = Stack()


class HostState:
    """What a host knows beside its parameters."""

    def __init__(self, view: LayerView) -> None:
        self.view = view
        self.selections: list[Selection] = []
        """Of the models through which its adapters were attached: one, save where a part was adapted for itself."""
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
        acting = compositions_on(self)
        if not acting:
            return self.original_class.forward(cast(nn.Module, self), *args, **kwargs)
        x, base = self._addenda.view.received(args, kwargs)
        count_call(self)
        return _run(self, acting, base, x)


def _run(host: Host, acting: list[Composition], base: Base, x: Any) -> Any:
    unfit = [each for each in acting if not isinstance(each, Stack)]
    if unfit and not isinstance(x, Tensor):
        raise MethodError(
            f"adapters on '{base.path}', a whole {base.kind}, cannot be composed as {unfit[0]}",
            hint="let one act, or several stacked: addenda.activate(model, [...])",
        )
    adapters = cast(Mapping[str, Adapter], host.adapters)
    *inner, last = acting
    for composition in inner:
        base = cast(Base, Stacked(base, functools.partial(_composed, composition, adapters)))
    return last.run(x, base, adapters)


def _composed(composition: Composition, adapters: Mapping[str, Adapter], x: Tensor, base: Base) -> Tensor:
    return composition.run(x, base, adapters)


def compositions_on(host: Host) -> list[Composition]:
    """Return what runs on a layer, the innermost first; nothing where none of its adapters takes part."""
    adapters = host.adapters
    selected = [selection.composition for selection in host._addenda.selections]
    return [each for each in selected if any(name in adapters for name in each.names)]


def running_on(host: Host) -> list[str]:
    """Return the names of the adapters that run on a layer, in the order in which they act."""
    return [name for each in compositions_on(host) for name in each.names if name in host.adapters]


def _noop_hook(module: nn.Module, args: object, output: object) -> None:
    """Present only so that PyTorch's fused inference paths, which read weights and call no layer, stay off."""


class PaddedEncoder:
    """Mixed in before ``nn.TransformerEncoder``: where gradients are wanted it computes on padded batches.

    Whether they are wanted the encoder tells by its weights, and those of a base are frozen. On nested tensors its
    attention would then refuse to be differentiated.
    """

    original_class: type[nn.Module]
    use_nested_tensor: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder; arguments as its own."""
        nested = self.use_nested_tensor
        self.use_nested_tensor = nested and not torch.is_grad_enabled()
        try:
            return self.original_class.forward(cast(nn.Module, self), *args, **kwargs)
        finally:
            self.use_nested_tensor = nested


def pad_encoders(model: nn.Module) -> list[nn.Module]:
    """Let every ``nn.TransformerEncoder`` compute on padded batches for gradients; returns those that are changed."""
    changed: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and not isinstance(module, PaddedEncoder)
    ]
    for module in changed:
        module.__class__ = adapted_class(type(module), PaddedEncoder)
    return changed


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


Fold = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Changes a (d_out, d_in) weight and a bias as `Adapter.fold` does."""


def fold(view: LayerView, folds: Iterable[Fold]) -> tuple[Tensor, Tensor | None]:
    """Return the layer's (d_out, d_in) weight and its bias with adapters folded in, one after another.

    It is done in float32 at least, whatever the layer's dtype, and rounded once.

    Raises:
        MethodError: an adapter cannot be folded, or gives a bias for which the layer has no place.
    """
    wide = torch.promote_types(view.dtype, torch.float32)
    weight, bias = view.weight().to(wide), view.bias()
    bias = None if bias is None else bias.to(wide)
    for each in folds:
        weight, bias = each(weight, bias)
    if bias is not None and view.bias_place() is None:
        raise MethodError(
            f"the adapter on '{view.path}' folds into a bias, for which its module has no place",
            hint="leave the layer out of the targets, or keep the adapter beside its base",
        )
    return weight.to(view.dtype), None if bias is None else bias.to(view.dtype)


def count_call(host: Host | None) -> None:
    """Note that the adapters of a layer run."""
    if host is not None and not torch.compiler.is_compiling():
        calls = host._addenda.calls
        for name in running_on(host):
            calls[name] = calls.get(name, 0) + 1


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of all adapter parameters on the model start with; a shared layer has several names."""
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if host_of(module)]
    return tuple(f"{path}.adapters." if path else "adapters." for path in paths)


def install(module: nn.Module, view: LayerView, name: str, adapter: Adapter, selection: Selection) -> None:
    """Put an adapter on a layer, swapping the layer's class if it is the first; ``selection`` says whether it runs."""
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
    if not any(known is selection for known in host._addenda.selections):
        host._addenda.selections.append(selection)


def remove(module: nn.Module, name: str) -> None:
    """Take an adapter off a layer; the last one to go gives the layer its class back."""
    host = cast(Host, module)
    del host.adapters[name]
    if len(host.adapters) == 0:
        cast(Any, module)._addenda_hook.remove()
        del module.adapters
        object.__delattr__(module, "_addenda")
        object.__delattr__(module, "_addenda_hook")
        module.__class__ = host.original_class
        if isinstance(module, Part):
            module.leave()
