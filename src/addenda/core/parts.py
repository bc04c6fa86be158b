"""Modules that hold several weights: each of them is shown as a linear layer of its own, a part.

``nn.MultiheadAttention``, ``nn.LSTM`` and the stacked experts of a mixture keep weights that no layer is called for.
A part stands for one such weight and has adapters like any other layer. It hangs under ``adapted_parts`` of the module
that holds the weight, its holder, only as long as it carries one, so the names of the base's parameters stay.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

__all__ = ["Holder", "Part", "Place", "adapted_class", "part_key", "reading"]


@dataclass(frozen=True)
class Place:
    """Where a module keeps a weight or a bias: a parameter, or some rows of one."""

    module: nn.Module
    name: str
    rows: int | slice | None = None
    """Index or stretch in the parameter's first dimension; None is all of it."""
    transposed: bool = False
    """Whether a weight is kept as (d_in, d_out)."""

    @property
    def parameter(self) -> Tensor | None:
        """The whole parameter, or None where there is none."""
        return self.module._parameters.get(self.name)

    def tensor(self) -> Tensor:
        """Return a view on what is kept here, a weight as (d_out, d_in)."""
        whole = cast(Tensor, getattr(self.module, self.name))
        kept = whole if self.rows is None else whole[self.rows]
        return kept.t() if self.transposed else kept

    def into(self, whole: Tensor | None, value: Tensor) -> Tensor:
        """Return the parameter with ``value`` here: in ``whole``, which an earlier call gave, or in a copy."""
        value = value.t() if self.transposed else value
        if self.rows is None:
            return value
        whole = cast(Tensor, self.parameter).detach().clone() if whole is None else whole
        whole[self.rows] = value
        return whole


class Holder:
    """Mixed in before the class of a module that holds several weights, while one of its parts has an adapter."""

    original_class: type[nn.Module]
    adapted_parts: nn.ModuleDict


class Part(nn.Module, ABC):
    """One weight of a holder as a linear layer; it has no parameters of its own."""

    holder: ClassVar[type[Holder]]
    """What is mixed into the class of the module that holds the weight."""
    owner: nn.Module
    forward = cast(Any, nn.Linear.forward)

    def __init__(self, owner: nn.Module, name: str, weight: Place, bias: Place | None) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # no child: the owner holds the part
        self.name, self.weight_at, self.bias_at = name, weight, bias

    @classmethod
    @abstractmethod
    def held_by(cls, module: nn.Module) -> bool:
        """Whether the module holds weights of this kind."""

    @classmethod
    @abstractmethod
    def names(cls, module: nn.Module) -> list[str]:
        """Return what the parts of the module are called after its path and a dot."""

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module, name: str) -> Self:
        """Make the part of this name."""

    @property
    def weight(self) -> Tensor:
        """A view on the weight, (d_out, d_in)."""
        return self.weight_at.tensor()

    @property
    def bias(self) -> Tensor | None:
        """A view on the bias, (d_out,), or None."""
        return None if self.bias_at is None else self.bias_at.tensor()

    @property
    def key(self) -> str:
        """Its name among the holder's children."""
        return part_key(self.name)

    def join(self) -> None:
        """Hang the part under its owner, which becomes a holder with the first one."""
        if not isinstance(self.owner, Holder):
            self.owner.__class__ = adapted_class(type(self.owner), self.holder)
            self.owner.adapted_parts = nn.ModuleDict()
        cast(Holder, self.owner).adapted_parts[self.key] = self.train(self.owner.training)

    def leave(self) -> None:
        """Take the part off its owner, which gets its class back with the last one."""
        holder = cast(Holder, self.owner)
        del holder.adapted_parts[self.key]
        if len(holder.adapted_parts) == 0:
            del holder.adapted_parts
            self.owner.__class__ = holder.original_class


def part_key(name: str) -> str:
    """Return what the part of this name is called among its holder's children, where no dot may be."""
    return name.replace(".", "/")


_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def adapted_class(original: type[nn.Module], mixin: type) -> type[nn.Module]:
    """Return a module class with ``mixin`` before it; one for each, so that such modules compare and compile alike."""
    if (original, mixin) not in _CLASSES:
        # Where transformers looks a class up by its full name, it has to be found as what it stands for.
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        _CLASSES[original, mixin] = type(
            f"Adapted{original.__name__}", (mixin, original), {"original_class": original, **names}
        )
    return _CLASSES[original, mixin]


@contextlib.contextmanager
def reading(changed: Mapping[tuple[nn.Module, str], Tensor | None]) -> Iterator[None]:
    """Let modules read other tensors in place of their parameters inside a ``with`` block.

    Args:
        changed: what to read, by the module and the parameter's name.
    """
    kept = {(module, name): module._parameters[name] for module, name in changed}
    try:
        for (module, name), value in changed.items():
            module._parameters[name] = cast("nn.Parameter | None", value)
        yield
    finally:
        for (module, name), parameter in kept.items():
            module._parameters[name] = parameter
