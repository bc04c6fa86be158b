"""Which method is tried where: every variant of each on every layer and model, with the reason where it is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from addenda.conformance.layers import LAYERS, PATHS
from addenda.conformance.models import MODELS, model_of
from addenda.conformance.trying import with_mixed
from addenda.core import registry
from addenda.core.contract import Method
from addenda.core.layers import kind_of, layer_at, view_of
from addenda.core.planning import plan
from addenda.errors import MethodError, TargetError

__all__ = ["Case", "changes_sequence", "on_layers", "on_models", "only_on", "parametrize"]


@dataclass(frozen=True)
class Case:
    """A method with one of its declared variants of settings, in one place."""

    method: Method
    variant: int
    place: str
    """A name in ``LAYERS`` or ``MODELS``."""
    refusal: str | None
    """Why the plan refuses the method there; None where it stands."""

    @property
    def id(self) -> str:
        """The name under which a test of it runs."""
        return f"{self.method.name}-{self.variant}-{self.place}"


def changes_sequence(method: Method | type[Method]) -> bool:
    """Tell whether a method stands on whole models rather than on layers of them."""
    return bool({"transformer", "attention"} & set(method.kinds))


def variants(name: str) -> list[tuple[int, Method]]:
    """Return a method with each of its declared settings, numbered."""
    cls = registry.get(name)
    return [(number, cls.from_settings(settings)) for number, settings in enumerate(cls.variants)]


@functools.cache
def on_layers(name: str) -> tuple[Case, ...]:
    """Return every variant of a method on every layer, those among them that are refused too."""
    return tuple(
        Case(method, number, layer, _refusal(method, layer))
        for number, method in variants(name)
        for layer in LAYERS
    )


@functools.cache
def _sample(place: str) -> nn.Module:
    """A model that is only looked at, whatever asks for it."""
    return LAYERS[place]()[0] if place in LAYERS else model_of(place)


def _refusal(method: Method, layer: str) -> str | None:
    path, model = PATHS.get(layer, "layer"), _sample(layer)
    if method.mixes():
        model = LAYERS[layer]()[0]
        try:
            with_mixed(model, method, path)
        except (MethodError, TargetError) as refusal:
            return str(refusal).splitlines()[0]  # there is nothing to mix
    view = view_of(layer_at(model, path), path)
    kind = kind_of(view.module)
    assert kind is not None
    why_not = kind.why_not(method)
    problems = [why_not] if why_not else [*method.problems_at(view), *method.problems_among([path])]
    return "; ".join(problems) or None


@functools.cache
def on_models(name: str) -> tuple[Case, ...]:
    """Return every variant of a method on every kind of transformer, those among them that are refused too."""
    return tuple(
        Case(method, number, kind, _refusal_by(kind, method))
        for number, method in variants(name)
        for kind in MODELS
        if changes_sequence(method)
    )


def _refusal_by(kind: str, method: Method) -> str | None:
    try:
        plan(_sample(kind), method)
    except (MethodError, TargetError) as refusal:
        return str(refusal).splitlines()[0]
    return None


Test = TypeVar("Test", bound=Callable[..., None])


def only_on(*places: str) -> Callable[[Test], Test]:
    """Try a property on these layers or models alone, because it takes long."""

    def narrow(test: Test) -> Test:
        test.places = places  # type: ignore[attr-defined]
        return test

    return narrow


def parametrize(metafunc: Any, cases: Callable[[str], Sequence[Case]], place: str) -> None:
    """Give a test that asks for a ``method`` the cases that it is about.

    These are where the method stands; of a test that asks for the ``reason`` as well, where it is refused. One that
    asks for no place has linear layers of its own.

    Args:
        metafunc: what pytest hands to ``pytest_generate_tests``; its module may name the ``METHODS`` to try.
        cases: all cases of a method, by its name.
        place: what tests call the place.
    """
    wanted = [name for name in ("method", place, "reason") if name in metafunc.fixturenames]
    if "method" not in wanted:
        return
    asked = getattr(metafunc.module, "METHODS", None) or metafunc.config.getoption("method", None)
    only = getattr(metafunc.function, "places", None) or (() if place in wanted else ("linear",))
    found = [
        case
        for name in asked or registry.names()
        for case in cases(name)
        if (case.refusal is None) != ("reason" in wanted) and (not only or case.place in only)
    ]
    values = [{"method": case.method, place: case.place, "reason": case.refusal} for case in found]
    metafunc.parametrize(
        wanted, [[each[name] for name in wanted] for each in values], ids=[case.id for case in found]
    )
