"""Starts: how the factors of a low-rank update begin; one file each in ``methods/starts/``, known by name.

A start is no method. It gives A0 and B0 for a layer, drawn, or computed from the layer's weight, or from what was
observed of the layer beforehand. What is trained, saved and exported afterwards is the method's alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Initializer
from addenda.core.observations import Needs, Observer
from addenda.errors import AddendaError, ConfigError, MethodError, NotFoundError, nearest

__all__ = ["Setting", "Start", "begin", "get", "jointly", "make", "names", "problems", "start", "wide_weight"]

Setting = bool | int | float | str
"""A value of one of a start's own settings."""


@dataclasses.dataclass(frozen=True)
class Start(ABC):
    """The settings of one start; subclasses are frozen dataclasses registered under a name, and otherwise stateless."""

    name: ClassVar[str] = ""
    """The registered name; set by :func:`start`."""
    needs: ClassVar[Needs | None] = None
    """What the factors are computed from; None where they are drawn."""
    moved: ClassVar[bool] = False
    """Whether B0 A0 is other than zero, so that the adapter has to take it off what it adds."""
    exact: ClassVar[bool] = True
    """Whether the adapted layer starts equal to its base."""
    rate: ClassVar[float] = 1.0
    """Factor on the method's usual learning rate: large factors move what they multiply further with each step."""

    @abstractmethod
    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return A0 (rank, d_in) and B0 (d_out, rank), in float32 or wider, on any device.

        Args:
            base: the layer; ``base.observed`` holds what the observer found.
            rank: inner dimension.
            scaling: what the method multiplies B A with.
            generator: draws what is random.
        """

    def observer(self, base: Base, rank: int) -> Observer:
        """Return what gathers what ``factors`` will find as ``base.observed``."""
        raise MethodError(f"start '{self.name}' observes nothing", hint="attach with it as it is")

    def ranks(
        self, ranks: Mapping[str, int], layers: Mapping[str, Mapping[str, Tensor]]
    ) -> Mapping[str, int]:
        """Return the ranks to use instead of ``ranks``, by path, given what was observed."""
        return ranks

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, one short sentence each."""
        return []

    def problems_at(self, base: Base, rank: int) -> list[str]:
        """Return why a layer's factors of this rank cannot begin like this, one short sentence each."""
        if self.needs == "inputs" and (base.channels_in != base.d_in or base.groups > 1):
            return [f"start '{self.name}' looks at inputs as rows of d_in features, which are not its own"]
        return []


def begin(
    start: Start, base: Base, rank: int, scaling: float
) -> tuple[nn.Parameter, nn.Parameter, tuple[Tensor, Tensor] | None]:
    """Make the factors of a layer's low-rank update, with their first values.

    Returns:
        A (rank, d_in), B (d_out, rank), and, where B A begins other than zero, frozen copies of both.
    """
    first, second = jointly(lambda generator: start.factors(base, rank, scaling, generator), 2)
    A, B = base.parameter(rank, base.d_in, init=first), base.parameter(base.d_out, rank, init=second)
    if not start.moved:
        return A, B, None
    return A, B, (base.constant(*A.shape, init=first), base.constant(*B.shape, init=second))


def jointly(make: Callable[[torch.Generator], Sequence[Tensor]], count: int) -> list[Initializer]:
    """Return initializers of so many tensors that come out of one computation; it is done for the first one asked.

    Example:
        >>> first, second = jointly(lambda _: (torch.ones(2), torch.zeros(1)), 2)
        >>> tensor = torch.empty(2)
        >>> first(tensor, torch.Generator())
        >>> tensor
        tensor([1., 1.])
    """
    made: list[Tensor] = []

    def initializer(which: int) -> Initializer:
        def fill(tensor: Tensor, generator: torch.Generator) -> None:
            with torch.no_grad():
                if not made:
                    made.extend(make(generator))
                tensor.copy_(made[which])

        return fill

    return [initializer(which) for which in range(count)]


def wide_weight(base: Base) -> Tensor:
    """Return the layer's weight (d_out, d_in) in float32 or wider."""
    weight = base.weight()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


_STARTS: dict[str, type[Start]] = {}
S = TypeVar("S", bound=type[Start])


def start(name: str) -> Callable[[S], S]:
    """Register a start under ``name``."""

    def decorate(cls: S) -> S:
        cls.name = name
        _STARTS[name] = cls
        return cls

    return decorate


def names() -> list[str]:
    """Return the names of all starts, sorted; the first call loads the files of ``methods/starts/``."""
    room = importlib.import_module("addenda.methods.starts")
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
    return sorted(_STARTS)


def get(name: str) -> type[Start]:
    """Return the class of the start called ``name``.

    Raises:
        NotFoundError: there is none.

    Example:
        >>> get("pissa").__name__
        'PiSSA'
    """
    if name not in _STARTS and name not in names():
        close = nearest(str(name), _STARTS)
        raise NotFoundError(
            f"no start is called '{name}'; known: {' '.join(names())}",
            hint=f"did you mean '{close[0]}'?" if close else "use one of these",
        )
    return _STARTS[name]


def make(name: str, settings: Mapping[str, Setting]) -> Start:
    """Return the start called ``name`` with its own settings.

    Raises:
        NotFoundError: there is no such start.
        ConfigError: a setting is unknown or out of range.

    Example:
        >>> make("pissa", {"iterations": 4})
        PiSSA(iterations=4)
    """
    cls = get(name)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in settings if key not in known]
    found = [f"start '{name}' has no setting '{key}'; it has: {' '.join(known) or 'none'}" for key in unknown]
    made = cls(**{key: value for key, value in settings.items() if key in known})
    found += [f"start_settings: {problem}" for problem in made.problems()]
    if found:
        raise ConfigError("; ".join(found), hint="correct start_settings")
    return made


def problems(name: object, settings: object) -> list[str]:
    """Return what is wrong with a start's name and settings, one short sentence each."""
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        return [f"start must be a name and start_settings a table, got {name!r} and {settings!r}"]
    try:
        make(name, settings)
    except AddendaError as problem:
        return [problem.message]
    return []
