"""Which of a model's adapters run, and how they are put together: stacked, summed, or each on rows of its own.

A composition is plain data; `addenda.core.selection` puts one on a model. On a layer it sees the adapters that the
layer has, so adapters on different layers compose too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.terms import Addend
from addenda.errors import ConfigError, MethodError, TargetError

__all__ = [
    "Composition",
    "Once",
    "Rows",
    "Stack",
    "Stacked",
    "Sum",
    "average",
    "bare_of",
    "parallel",
    "require_names",
]


class Composition(ABC):
    """How the adapters of a model act together."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The adapters that take part, each once."""

    @abstractmethod
    def without(self, name: str) -> Composition:
        """The same without one adapter: rows that were its own run the bare layer."""

    @abstractmethod
    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        """Return what a layer gives for ``x`` with those of ``adapters``, by name, that take part."""

    @abstractmethod
    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the (d_out, d_in) weight and (d_out,) bias with which the bare layer computes the same.

        Raises:
            MethodError: there is no such weight.
        """

    def parts(self, adapters: Mapping[str, Adapter], x: Tensor, path: str) -> tuple[Addend, ...] | None:
        """Return the low-rank terms that `run` adds to the layer's output, if that is all it does, else None.

        Args:
            adapters: the layer's, by name.
            x: its input, (..., d_in); rows are counted over all dimensions but the last.
            path: where the layer is.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """Return it as plain values; `addenda.core.activating.from_settings` reads them."""
        return {"kind": type(self).__name__.lower(), **dataclasses.asdict(cast(Any, self))}


@dataclass(frozen=True)
class Stack(Composition):
    """Each adapter on top of those before it.

    y = a_n(... a_2(a_1(base)) ...)(x). Adapters that only add a term, such as LoRA, give their sum.

    Args:
        of: names, the innermost first.

    Example:
        >>> Stack(("a", "b")).without("a")
        Stack(of=('b',))
    """

    of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_names(self.of)

    @property
    def names(self) -> tuple[str, ...]:
        return self.of

    def without(self, name: str) -> Stack:
        return Stack(tuple(other for other in self.of if other != name))

    def parts(self, adapters: Mapping[str, Adapter], x: Tensor, path: str) -> tuple[Addend, ...] | None:
        return _joined([(adapters[name], 1.0) for name in self.names if name in adapters])

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        own = weight, bias
        for name in self.names:
            if name not in adapters:
                continue
            adapter = adapters[name]
            if adapter.additive and adapter.reads_weight:  # its term is that of the layer's own weight
                weight, bias = _with_change((weight, bias), own, adapter.fold(*own))
            else:
                weight, bias = adapter.fold(weight, bias)
        return weight, bias

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        present = [adapters[name] for name in self.names if name in adapters]
        if len(present) > 1 and (parts := self.parts(adapters, x, base.path)) is not None:
            return base.add_low_rank(x, *parts[0][:3])
        *inner, last = present or [_BARE]
        for adapter in inner:
            base = cast(Base, Stacked(base, adapter))
        y: Tensor = last(x, base)
        return y


@dataclass(frozen=True)
class Sum(Composition):
    """The weighted sum of what each adapter alone changes.

    y = base(x) + sum of weight_i * (a_i(x) - base(x)); weights may be negative, which takes an adapter's effect away.

    Args:
        weights: weight of each adapter by name, finite.

    Example:
        >>> Sum({"law": 0.7, "style": 0.3}).names
        ('law', 'style')
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        require_names(tuple(self.weights))
        odd = [f"{name} = {w!r}" for name, w in self.weights.items() if not _is_finite(w)]
        if odd:
            raise ConfigError(
                f"weights must be finite numbers: {', '.join(odd)}", hint="give each adapter a number"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def without(self, name: str) -> Sum:
        return Sum({other: weight for other, weight in self.weights.items() if other != name})

    def parts(self, adapters: Mapping[str, Adapter], x: Tensor, path: str) -> tuple[Addend, ...] | None:
        return _joined(
            [(adapters[name], weight) for name, weight in self.weights.items() if name in adapters]
        )

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        total = own = weight, bias
        for name, share in self.weights.items():
            if name in adapters:
                total = _with_change(total, own, adapters[name].fold(*own), share)
        return total

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        if (parts := self.parts(adapters, x, base.path)) is not None:
            return base.add_low_rank(x, *parts[0][:3])
        once = cast(Base, Once(base, x))
        total = plain = once(x)
        for name, weight in self.weights.items():
            if name in adapters:
                total = total + weight * (adapters[name](x, once) - plain)
        return total


def parallel(*names: str) -> Sum:
    """Every adapter beside the others: the sum of what each changes.

    Example:
        >>> parallel("a", "b")
        Sum(weights={'a': 1.0, 'b': 1.0})
    """
    return Sum(dict.fromkeys(names, 1.0))


def average(*names: str) -> Sum:
    """The mean of what the adapters change.

    Example:
        >>> average("a", "b").weights["a"]
        0.5
    """
    return Sum(dict.fromkeys(names, 1.0 / max(1, len(names))))


@dataclass(frozen=True)
class Rows(Composition):
    """Each row of a batch with an adapter of its own, or with none, in one pass; in training too.

    Args:
        of: for each row the name of its adapter, or None for the bare layer.
        lengths: tokens of each row where the rows lie end to end in one sequence (packed), in the same order; None
            where the first dimension counts the rows.

    Example:
        >>> Rows(("law", None, "law")).names
        ('law',)
    """

    of: tuple[str | None, ...]
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require_names(tuple(dict.fromkeys(name for name in self.of if name is not None)))
        if self.lengths is not None and len(self.lengths) != len(self.of):
            raise ConfigError(
                f"{len(self.of)} rows have {len(self.lengths)} lengths", hint="give one length for each row"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in self.of if name is not None))

    def without(self, name: str) -> Rows:
        return Rows(tuple(None if own == name else own for own in self.of), self.lengths)

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        owners = {name if name in adapters else None for name in self.of}
        if len(owners) > 1:
            raise MethodError(
                "rows cannot have adapters of their own on a weight that is read and not called",
                hint="route adapters on layers that are called, or run the rows one adapter at a time",
            )
        [owner] = owners
        return (weight, bias) if owner is None else adapters[owner].fold(weight, bias)

    def parts(self, adapters: Mapping[str, Adapter], x: Tensor, path: str) -> tuple[Addend, ...] | None:
        dim = self._dim(x, path, features=True)
        each = x.shape[:-1].numel() // x.shape[dim]  # rows of the flattened input to one place in ``dim``
        found = []
        for name, start, stop in self._stretches:
            if name is None or name not in adapters:
                continue
            term = adapters[name].low_rank_term()
            if term is None:
                return None
            found.append(Addend(*term, (start * each, stop * each)))
        return tuple(found)

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        if base.routed and len({name if name in adapters else None for name in self.of}) > 1:
            raise TargetError(
                f"layer '{base.path}' is given rows in an order of its router's: they cannot be routed to adapters",
                hint="route adapters on layers that see every row",
            )
        features = base.channels_in is not None
        dim = self._dim(x, base.path, features=features)
        terms = self.parts(adapters, x, base.path) if features else None
        if terms is not None and (fused := base.add_low_ranks(x, terms)) is not None:
            return fused
        stretches = self._until(x.shape[dim])
        owners = [
            adapters[name] if name is not None and name in adapters else _BARE for name, _, _ in stretches
        ]
        view = cast(Any, base)
        if (
            view.args or view.kwargs or any(owner.by_place for owner in owners)
        ):  # it belongs to all rows at once
            once = cast(Base, Once(base, x))
            whole = {owner: owner(x, once) for owner in dict.fromkeys(owners)}
            made = [
                whole[owner].narrow(dim, start, stop - start)
                for owner, (_, start, stop) in zip(owners, stretches, strict=True)
            ]
        else:
            made = [
                owner(x.narrow(dim, start, stop - start), base)
                for owner, (_, start, stop) in zip(owners, stretches, strict=True)
            ]
        return made[0] if len(made) == 1 else torch.cat(made, dim)

    def _dim(self, x: Tensor, path: str, *, features: bool) -> int:
        """Return the dimension that counts rows, or tokens where they lie end to end."""
        size = self._stretches[-1][2] if self._stretches else 0
        dim = 0 if self.lengths is None else x.dim() - (2 if features else 1)
        found = x.shape[dim] if x.dim() > dim >= 0 and x.shape[:dim].numel() == 1 else 0
        if found < size or (found > size and self.lengths is None):
            raise TargetError(
                f"{size} {'rows' if self.lengths is None else 'tokens'} are routed, and layer '{path}' is given "
                f"an input of shape {tuple(x.shape)}",
                hint="route as many rows as the batch has; layers that mix rows cannot be routed",
            )
        return dim

    def _until(self, size: int) -> list[tuple[str | None, int, int]]:
        """The stretches of a sequence of that size: what is filled up behind the last row runs the bare layer."""
        end = self._stretches[-1][2] if self._stretches else 0
        return [*self._stretches, (None, end, size)] if size > end else self._stretches

    @functools.cached_property
    def _stretches(self) -> list[tuple[str | None, int, int]]:
        """Neighbouring rows of one adapter: its name, their first place and the one after the last."""
        sizes = self.lengths or (1,) * len(self.of)
        found: list[tuple[str | None, int, int]] = []
        end = 0
        for name, size in zip(self.of, sizes, strict=True):
            start = found.pop()[1] if found and found[-1][0] == name else end
            end += size
            found.append((name, start, end))
        return found


class _Bare(Adapter):
    """The adapter that does nothing."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x)


_BARE = _Bare()


class _Over:
    """A base under another one: what is not said here is the bare layer's."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return Base.add_low_rank(cast(Base, self), x, A, B, scaling)

    def add_low_ranks(self, x: Tensor, parts: Sequence[Addend]) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class Stacked(_Over):
    """A base with an adapter already on it: calling it runs both."""

    def __init__(self, base: Base, adapter: Callable[[Tensor, Base], Tensor]) -> None:
        super().__init__(base)
        self._adapter = adapter

    def __call__(self, x: Tensor) -> Tensor:
        return self._adapter(x, self._base)

    def add_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bare = bare_of(self._base)
        change: Tensor = bare.add_weight(x, weight, bias) - bare(x)
        return self(x) + change


class Once(_Over):
    """A base that has run on one input already and does not run on it again."""

    def __init__(self, base: Base, x: Tensor) -> None:
        super().__init__(base)
        self._x = x
        self.output: Tensor = base(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.output if x is self._x else self._base(x)


def bare_of(base: Base) -> Base:
    """Return the layer itself, without what stands on it."""
    bare: Any = base
    while isinstance(bare, _Over):
        bare = bare._base
    return cast(Base, bare)


_Folded = tuple[Tensor, Tensor | None]


def _with_change(total: _Folded, own: _Folded, folded: _Folded, share: float = 1.0) -> _Folded:
    """A weight and bias with a share of what a fold changes of the layer's own."""
    (weight, bias), (own_weight, own_bias), (folded_weight, folded_bias) = total, own, folded
    weight = weight + share * (folded_weight - own_weight)
    if folded_bias is None:
        return weight, bias
    start = torch.zeros_like(folded_bias) if own_bias is None else own_bias
    return weight, (start if bias is None else bias) + share * (folded_bias - start)


def _joined(every: Sequence[tuple[Adapter, float]]) -> tuple[Addend, ...] | None:
    """The terms of several adapters as one of the sum of their ranks; None where one of them has none."""
    terms = [(adapter.low_rank_term(), weight) for adapter, weight in every]
    found = [(*term, weight) for term, weight in terms if term is not None]
    if not found or len(found) < len(terms):
        return None
    if len(found) == 1:
        A, B, scaling, weight = found[0]
        return (Addend(A, B, weight * scaling),)
    A = torch.cat([A for A, _, _, _ in found])
    return (Addend(A, torch.cat([B * (weight * scaling) for _, B, scaling, weight in found], 1), 1.0),)


def require_names(names: Sequence[str]) -> None:
    """Refuse what does not name adapters, each once.

    Raises:
        ConfigError: a name is no text, or comes twice.
    """
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong or len(set(names)) < len(names):
        raise ConfigError(
            f"adapters are named by texts, each once, got {list(names)}", hint="see addenda.handles(model)"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
