"""Which of a model's adapters run, and how they are put together: stacked, summed, or each on rows of its own.

A composition is plain data; `addenda.core.selection` puts one on a model. On a layer it sees the adapters that the
layer has, so adapters on different layers compose too.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.errors import ConfigError, MethodError, TargetError

__all__ = ["Composition", "Rows", "Stack", "Stacked", "Sum", "average", "from_settings", "parallel"]

Term = tuple[Tensor, Tensor, float]
"""A, B and the scaling of a low-rank term."""


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

    def term(self, adapters: Mapping[str, Adapter]) -> Term | None:
        """Return the one low-rank term that `run` adds to the layer's output, if that is all it does."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return it as plain values; `from_settings` reads them."""
        return {"kind": type(self).__name__.lower(), **dataclasses.asdict(cast(Any, self))}


@dataclass(frozen=True)
class Stack(Composition):
    """Each adapter on top of those before it.

    y = a_n(... a_2(a_1(base)) ...)(x). Adapters that only add a term, such as LoRA, give their sum.

    Args:
        parts: names, the innermost first.

    Example:
        >>> Stack(("a", "b")).without("a")
        Stack(parts=('b',))
    """

    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_names(self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        return self.parts

    def without(self, name: str) -> Stack:
        return Stack(tuple(part for part in self.parts if part != name))

    def term(self, adapters: Mapping[str, Adapter]) -> Term | None:
        return _joined([(adapters[name], 1.0) for name in self.parts if name in adapters])

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        for name in self.parts:
            if name in adapters:
                weight, bias = adapters[name].fold(weight, bias)
        return weight, bias

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        present = [adapters[name] for name in self.parts if name in adapters]
        if len(present) > 1 and (term := self.term(adapters)) is not None:
            return base.add_low_rank(x, *term)
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
        _require_names(tuple(self.weights))
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

    def term(self, adapters: Mapping[str, Adapter]) -> Term | None:
        return _joined(
            [(adapters[name], weight) for name, weight in self.weights.items() if name in adapters]
        )

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        total, total_bias = weight, bias
        for name, share in self.weights.items():
            if name not in adapters:
                continue
            folded, folded_bias = adapters[name].fold(weight, bias)
            total = total + share * (folded - weight)
            if folded_bias is not None:
                start = torch.zeros_like(folded_bias) if bias is None else bias
                total_bias = (start if total_bias is None else total_bias) + share * (folded_bias - start)
        return total, total_bias

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        if (term := self.term(adapters)) is not None:
            return base.add_low_rank(x, *term)
        once = cast(Base, _Once(base, x))
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
        _require_names(tuple(dict.fromkeys(name for name in self.of if name is not None)))
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

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        if base.routed and len({name if name in adapters else None for name in self.of}) > 1:
            raise TargetError(
                f"layer '{base.path}' is given rows in an order of its router's: they cannot be routed to adapters",
                hint="route adapters on layers that see every row",
            )
        dim, groups = self._groups(x, adapters, base.path)
        if len(groups) == 1:
            [(adapter, _)] = groups
            y: Tensor = (adapter or _BARE)(x, base)
            return y
        order = torch.cat([places for _, places in groups])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        terms = [adapter.low_rank_term() if adapter else None for adapter, _ in groups]
        if all(term is not None or adapter is None for term, (adapter, _) in zip(terms, groups, strict=True)):
            return base(x) + self._terms(x, base, groups, terms, dim).index_select(dim, back)
        parts = [(adapter or _BARE)(x.index_select(dim, places), base) for adapter, places in groups]
        return torch.cat(parts, dim).index_select(dim, back)

    @staticmethod
    def _terms(
        x: Tensor,
        base: Base,
        groups: Sequence[tuple[Adapter | None, Tensor]],
        terms: Sequence[Term | None],
        dim: int,
    ) -> Tensor:
        """What the low-rank terms add, group after group; the frozen product is one for all rows."""
        made: list[Tensor | int] = []
        for (_, places), term in zip(groups, terms, strict=True):
            if term is None:
                made.append(len(places))
                continue
            A, B, scaling = term
            made.append(
                scaling * base.low_rank(x.index_select(dim, places), A.to(base.dtype), B.to(base.dtype))
            )
        like = next(part for part in made if isinstance(part, Tensor))
        parts = [
            part
            if isinstance(part, Tensor)
            else like.new_zeros(*like.shape[:dim], part, *like.shape[dim + 1 :])
            for part in made
        ]
        return torch.cat(parts, dim)

    def _groups(
        self, x: Tensor, adapters: Mapping[str, Adapter], path: str
    ) -> tuple[int, list[tuple[Adapter | None, Tensor]]]:
        """The dimension that counts rows or tokens, and for each adapter its places there."""
        owners = [name if name in adapters else None for name in self.of]
        if self.lengths is None:
            dim, size = 0, len(owners)
        else:
            size = sum(self.lengths)
            dim = 0 if x.shape[0] == size else 1
            owners = [name for name, length in zip(owners, self.lengths, strict=True) for _ in range(length)]
        if x.dim() <= dim or x.shape[dim] != size:
            raise TargetError(
                f"{size} {'rows' if self.lengths is None else 'tokens'} are routed, and layer '{path}' is given "
                f"an input of shape {tuple(x.shape)}",
                hint="route as many rows as the batch has; layers that mix rows cannot be routed",
            )
        places: dict[str | None, list[int]] = {}
        for place, name in enumerate(owners):
            places.setdefault(name, []).append(place)
        return dim, [
            (None if name is None else adapters[name], torch.tensor(found, device=x.device))
            for name, found in places.items()
        ]


_KINDS: dict[str, Callable[..., Composition]] = {"stack": Stack, "sum": Sum, "rows": Rows}


def from_settings(settings: Mapping[str, Any]) -> Composition:
    """Make a composition from the plain values of `Composition.settings`.

    Raises:
        ConfigError: they describe none.

    Example:
        >>> from_settings({"kind": "stack", "parts": ["a"]})
        Stack(parts=('a',))
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


class _Bare(Adapter):
    """The adapter that does nothing."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x)


_BARE = _Bare()


class Stacked:
    """A base with an adapter already on it: calling it runs both, everything else is the bare layer's."""

    def __init__(self, base: Base, adapter: Callable[[Tensor, Base], Tensor]) -> None:
        self._base, self._adapter = base, adapter

    def __call__(self, x: Tensor) -> Tensor:
        return self._adapter(x, self._base)

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return Base.add_low_rank(cast(Base, self), x, A, B, scaling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class _Once:
    """A base that has run on one input already and does not run on it again."""

    def __init__(self, base: Base, x: Tensor) -> None:
        self._base, self._x, self._y = base, x, base(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self._y if x is self._x else self._base(x)

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return Base.add_low_rank(cast(Base, self), x, A, B, scaling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _joined(parts: Sequence[tuple[Adapter, float]]) -> Term | None:
    """The terms of several adapters as one of the sum of their ranks; None where one of them has none."""
    terms = [(adapter.low_rank_term(), weight) for adapter, weight in parts]
    found = [(*term, weight) for term, weight in terms if term is not None]
    if not found or len(found) < len(terms):
        return None
    if len(found) == 1:
        A, B, scaling, weight = found[0]
        return A, B, weight * scaling
    return (
        torch.cat([A for A, _, _, _ in found]),
        torch.cat([B * (weight * scaling) for _, B, scaling, weight in found], 1),
        1.0,
    )


def _require_names(names: Sequence[str]) -> None:
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong or len(set(names)) < len(names):
        raise ConfigError(
            f"adapters are named by texts, each once, got {list(names)}", hint="see addenda.handles(model)"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
