"""Attach and detach: plan, validate, then change the model; a failed call leaves it as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from addenda.core.building import build_adapters
from addenda.core.composition import Stack
from addenda.core.contract import Adapter, Method
from addenda.core.foreign import keep_layout
from addenda.core.handle import Handle, _registry, handles
from addenda.core.host import host_of, install
from addenda.core.layers import layer_at, view_of
from addenda.core.mixing import require_mixable
from addenda.core.observations import Observed
from addenda.core.planning import plan
from addenda.core.preview import Preview
from addenda.core.probe import Probe, prove, prove_by_own_batch
from addenda.core.progress import OnProgress
from addenda.core.targets import Targets
from addenda.core.through import rounding_of, train_through
from addenda.core.tokens import TokenWatch
from addenda.core.views import LayerView
from addenda.errors import MethodError, NotFoundError, TargetError

__all__ = ["attach", "attach_paths", "detach", "install_adapters", "require_free"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OWN_NAMES = frozenset(dir(nn.ModuleDict()))


def attach(
    model: nn.Module,
    method: Method,
    targets: Targets | None = None,
    *,
    name: str = "default",
    seed: int = 0,
    probe: Probe | None = None,
    observed: Observed | None = None,
    through: str | None = None,
    on_progress: OnProgress | None = None,
) -> Handle:
    """Put a new adapter on a model, in place, and freeze the base.

    The base is its parameters and its buffers. Batch norms change theirs in training mode: keep such layers in
    ``eval()``, or the adapter belongs to a base that is nowhere else.

    Args:
        model: any module; the layers named by ``targets`` change their class, and what holds or runs them where it
            passes them by: attention, recurrent modules, stacked experts, ``nn.TransformerEncoder``. Nothing else does.
        method: which method, with its settings, such as ``LoRA(rank=16)``.
        targets: ``"all-linear"`` (every linear layer but the output head), ``"all-norms"``, ``"all-blocks"`` (of a
            transformer), the literal end of a layer's path such as ``"q_proj"``, or several of these. None lets the
            method choose.
        name: the adapter's name; a model can carry several.
        seed: decides the initial values, layer by layer.
        probe: a batch that reaches every target: keyword arguments, a tensor, or a function of the model. With it,
            every adapter is proved to be called and to get a gradient. transformers models carry a batch of their own.
        observed: what :func:`addenda.observe` found out about this model for this method, if its start needs that.
        through: a packed format such as ``"q4_1"``: every layer then computes with the weight that a file in this
            format will hold once the adapter is folded in, so that the file answers as the model that is trained. None
            trains beside the weight as it is.
        on_progress: told how many adapters are made; some starts decompose each weight.

    Returns:
        The handle on the adapter.

    Raises:
        TargetError: a target matches nothing, the name is taken, or the probe shows an adapter that does not work.
        MethodError: the method cannot stand on one of the layers, needs to have observed them, or cannot be trained
            through the format.
        NotFoundError: it mixes adapters that the model does not carry.

    Example:
        >>> import addenda, torch
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> handle = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], probe=torch.randn(3, 8))
        >>> handle.trainable_parameters
        24
        >>> handle.detach()
        >>> type(model[0]).__name__
        'Linear'
    """
    planned = plan(model, method, targets, through=through)
    paths = [row.path for row in planned.rows]
    _require_observed(method, paths, observed)
    return attach_paths(
        model,
        method,
        paths,
        name=name,
        seed=seed,
        probe=probe,
        observed=observed,
        through=planned.through,
        on_progress=on_progress,
    )


def attach_paths(
    model: nn.Module,
    method: Method,
    paths: list[str],
    *,
    name: str,
    seed: int = 0,
    probe: Probe | None = None,
    fill: Callable[[Handle], None] | None = None,
    observed: Observed | None = None,
    through: str | None = None,
    on_progress: OnProgress | None = None,
) -> Handle:
    """Attach to exactly these layers; for callers that have resolved the targets already.

    With ``fill``, which writes saved values into the adapter, nothing is initialized, and the probe asks only whether
    every adapter is called: a trained one may well have a gradient of zero.
    """
    layers = {path: layer_at(model, path) for path in paths}
    require_free(model, name, layers)
    require_mixable(handles(model), method)
    views = {path: view_of(layers[path], path, seed=seed, initialize=fill is None) for path in paths}
    for path, view in views.items():
        view.observed = observed.layers[path] if observed is not None else None
    adapters = build_adapters(method, views, on_progress=on_progress)
    if through is not None:
        rounding = rounding_of(through)
        for adapter in adapters.values():
            train_through(adapter, rounding)
    handle = install_adapters(model, method, name, views, adapters)
    try:
        if fill is not None:
            fill(handle)
        if probe is None:
            prove_by_own_batch(handle, gradients=fill is None)
        else:
            prove(handle, probe, gradients=fill is None)
    except BaseException:
        handle.detach()
        raise
    return handle


def detach(model: nn.Module, name: str = "default") -> None:
    """Take the adapter called ``name`` off the model.

    Raises:
        NotFoundError: the model carries no such adapter.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = addenda.attach(model, addenda.BitFit(), name="shift")
        >>> addenda.detach(model, "shift")
        >>> type(model[0]).__name__
        'Linear'
    """
    on_model = handles(model)
    if name not in on_model:
        raise NotFoundError(
            f"the model carries no adapter '{name}'",
            where={"adapters": " ".join(on_model) or "none"},
            hint="use one of the names above" if on_model else "nothing is attached",
        )
    on_model[name].detach()


def install_adapters(
    model: nn.Module,
    method: Method,
    name: str,
    views: dict[str, LayerView],
    adapters: dict[str, Adapter],
) -> Handle:
    """Put made adapters on the layers that were viewed for them; the base is frozen."""
    keep_layout(model)
    registry = _registry(model)
    for path, view in views.items():
        install(view.module, view, name, adapters[path], registry.selection)
    handle = Handle(model, method, name, {path: view.module for path, view in views.items()})
    registry.handles[name] = handle
    registry.rest(method.mixes())
    registry.selection.composition = Stack((*registry.selection.composition.names, name))
    if method.reads_tokens():
        registry.watch = registry.watch or TokenWatch(model)
        for path in views:
            handle._host(path)._addenda.view.watch = registry.watch
    if method.looks_ahead():
        registry.preview = registry.preview or Preview(model, registry.selection)
        registry.preview.names.add(name)
        for path in views:
            handle._host(path)._addenda.view.preview = registry.preview
    return handle


def _require_observed(method: Method, paths: list[str], observed: Observed | None) -> None:
    needs = method.needs()
    if needs in (None, "weight"):
        return
    if observed is None:
        given = "original=the model it was quantized from" if needs == "original" else "batches=a few batches"
        raise MethodError(
            f"method '{method.name}' begins with the {needs} of each layer, which have to be observed first",
            hint=f"observed = addenda.observe(model, method, targets, {given}); "
            "then attach(model, observed.method, targets, observed=observed)",
        )
    missing = [path for path in paths if path not in observed.layers]
    if observed.method != method or missing:
        what = f"not of '{missing[0]}'" if missing else "for other settings of the method"
        raise MethodError(
            f"what was observed is {what}",
            where={"layers missing": len(missing)},
            hint="attach observed.method, to the targets that were observed",
        )


def require_free(model: nn.Module, name: str, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a name that an adapter on these layers cannot have.

    Raises:
        TargetError: it is no name, or taken.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _OWN_NAMES:
        raise TargetError(
            f"{name!r} cannot be an adapter's name",
            hint="use up to 64 letters, digits, '-' and '_', starting with a letter or digit; names that modules "
            "use themselves, such as 'keys' or 'training', are not free",
        )
    taken = handles(model)
    if taken and not isinstance(_registry(model).selection.composition, Stack):
        raise TargetError(
            f"cannot attach '{name}' while {_registry(model).selection.composition} is active",
            where={"adapters": " ".join(taken)},
            hint="activate a stack first, such as addenda.activate(model, [])",
        )
    if name in taken:
        raise TargetError(
            f"the model already carries an adapter '{name}'",
            where={"adapters": " ".join(taken)},
            hint=f"choose another name, or detach it first: addenda.detach(model, '{name}')",
        )
    held = [path for path, module in layers.items() if (host := host_of(module)) and name in host.adapters]
    if held:
        raise TargetError(
            f"'{held[0]}' already carries an adapter '{name}', attached through another module",
            where={"layers": len(held)},
            hint="choose another name, or detach it by the handle of that attach",
        )
    foreign = [path for path, module in layers.items() if hasattr(module, "adapters") and not host_of(module)]
    if foreign:
        raise TargetError(
            f"'{foreign[0]}' already has an attribute 'adapters' of its own",
            where={"layers": len(foreign)},
            hint="leave it out of the targets, or rename the attribute",
        )
