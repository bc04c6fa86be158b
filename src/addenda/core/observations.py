"""What may have to be known of a layer before its adapter can begin: the contract of those who gather it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from addenda.core.contract import Method

__all__ = ["Needs", "Observed", "Observer"]

Needs = Literal["weight", "inputs", "gradients", "original"]
"""What the first values of an adapter are computed from: the layer's weight, its inputs on some data, the gradient of
its weight on some data, or the weight of another model that it was rounded from. All but the first are observed."""


class Observer(ABC):
    """Gathers, piece by piece, what the adapter of one layer begins with; made by :meth:`Method.observer`."""

    @abstractmethod
    def see(self, seen: Tensor) -> None:
        """Take in a piece, in float32 or wider.

        Args:
            seen: by what the method needs: ``(n, d_in)`` inputs of one batch, the ``(d_out, d_in)`` gradient of the
                mean loss of one batch, or the ``(d_out, d_in)`` original weight less the layer's own.
        """

    @abstractmethod
    def found(self) -> dict[str, Tensor]:
        """Return what was found out so far, for ``base.observed``.

        Raises:
            MethodError: it is too little.
        """


@dataclass(frozen=True)
class Observed:
    """What :func:`addenda.observe` found out about the layers of a model, for :func:`addenda.attach`."""

    method: Method
    """The method that was asked for, with the settings that follow from what was observed: attach this one."""
    layers: Mapping[str, Mapping[str, Tensor]]
    """What was found, by the layer's path."""
