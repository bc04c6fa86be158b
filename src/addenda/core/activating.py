"""Choosing which of a model's adapters run, and how they act together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from addenda.core.arrow import Arrow
from addenda.core.composition import Composition, Rows, Stack, Sum
from addenda.core.handle import _registry, handles
from addenda.core.mixing import require_apart
from addenda.errors import ConfigError, MethodError, NotFoundError, nearest

__all__ = ["activate", "activated", "active_composition", "from_settings"]

Wanted = Composition | str | Sequence[str] | None
"""A composition, one adapter, several stacked in this order, or None for the bare base."""


def activate(model: nn.Module, wanted: Wanted) -> None:
    """Let exactly these adapters run; the change is one assignment, however many adapters and layers there are.

    Args:
        model: a model that carries adapters.
        wanted: an adapter's name; several, each stacked on those before it; a composition such as
            ``Sum({"law": 0.7, "style": 0.3})`` or ``Rows(["law", None])``; or None for the base alone.

    Raises:
        NotFoundError: the model carries no adapter of that name; all of them are named.
        MethodError: one of them is merged, or would run twice: by itself and as part of a mixture.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> for name in ("law", "style"):
        ...     _ = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name=name)
        >>> addenda.activate(model, "style")
        >>> [name for name, handle in addenda.handles(model).items() if handle.active]
        ['style']
    """
    composition = _composition(wanted)
    on_model = handles(model)
    unknown = [name for name in composition.names if name not in on_model]
    if unknown or not on_model:
        close = nearest(unknown[0], on_model) if unknown else []
        missing = ", ".join(f"'{name}'" for name in unknown)
        raise NotFoundError(
            f"the model carries no adapter {missing}" if unknown else "the model carries no adapter",
            where={"adapters": " ".join(on_model) or "none"},
            hint=f"did you mean '{close[0]}'?" if close else "attach or load it first",
        )
    merged = [name for name in composition.names if on_model[name].merged]
    if merged:
        raise MethodError(
            f"adapter '{merged[0]}' is merged: it acts already", hint="call its unmerge() first"
        )
    require_apart(on_model, composition)
    _registry(model).selection.composition = composition


@contextlib.contextmanager
def activated(model: nn.Module, wanted: Wanted) -> Iterator[None]:
    """Let exactly these adapters run inside a ``with`` block; backward passes belong into it too.

    Arguments and errors as for `activate`.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> handle = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name="law")
        >>> with addenda.activated(model, None):
        ...     handle.active
        False
    """
    before = active_composition(model)
    activate(model, wanted)
    try:
        yield
    finally:
        _registry(model).selection.composition = before


def active_composition(model: nn.Module) -> Composition:
    """Return what runs on the model now; an empty stack where it carries no adapter."""
    return _registry(model).selection.composition if handles(model) else Stack()


_KINDS: dict[str, Callable[..., Composition]] = {"stack": Stack, "sum": Sum, "rows": Rows, "arrow": Arrow}


def from_settings(settings: Mapping[str, Any]) -> Composition:
    """Make a composition from the plain values of `Composition.settings`.

    Raises:
        ConfigError: they describe none.

    Example:
        >>> from_settings({"kind": "stack", "of": ["a"]})
        Stack(of=('a',))
    """
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key != "kind"}
    try:
        return _KINDS[settings["kind"]](**values)
    except (KeyError, TypeError) as problem:
        raise ConfigError(
            f"these settings describe no composition: {dict(settings)}",
            where={"kinds": " ".join(_KINDS)},
            hint="write them with Composition.settings()",
        ) from problem


def _composition(wanted: Wanted) -> Composition:
    if isinstance(wanted, Composition):
        return wanted
    if wanted is None or isinstance(wanted, str):
        return Stack((wanted,) if wanted else ())
    return Stack(tuple(wanted))
