"""Settings that methods share: an inner dimension and a scaling, of which single layers may have others."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from addenda.core.contract import Base, Method
from addenda.core.ranges import integer, number, table
from addenda.core.targets import at, strays

__all__ = ["Ranked", "Scaled"]


@dataclass(frozen=True)
class Ranked(Method):
    """The settings of an inner dimension; not a method by itself."""

    least_rank: ClassVar[int] = 1
    """Smallest rank of a single layer."""

    rank: int = 16
    """Inner dimension of the update."""
    ranks: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    """Rank for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        least = functools.partial(integer, least=self.least_rank)
        return integer("rank", self.rank) + table("ranks", self.ranks, least)

    def problems_at(self, base: Base) -> list[str]:
        rank, limit = self.rank_at(base.path), min(base.d_in, base.d_out)
        return [f"rank {rank} exceeds min(d_in, d_out) = {limit}"] if rank > limit else []

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        return strays(paths, **self.tables())

    def tables(self) -> dict[str, Mapping[str, float]]:
        """Return the settings that stand by suffixes of layers, by name."""
        return {"ranks": self.ranks}

    def rank_at(self, path: str) -> int:
        """Return the rank that applies to the layer at ``path``."""
        return at(path, self.ranks, self.rank)


@dataclass(frozen=True)
class Scaled(Ranked):
    """The settings of an inner dimension and a scaling, alpha over the rank; not a method by itself."""

    usual_scaling: ClassVar[float] = 1.0
    """The scaling where alpha is None."""

    alpha: float | None = None
    """Numerator of the scaling; None means the rank."""
    alphas: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """Alpha for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        above_zero = functools.partial(number, above=0.0)
        found = [] if self.alpha is None else above_zero("alpha", self.alpha)
        return super().problems() + found + table("alphas", self.alphas, above_zero)

    def tables(self) -> dict[str, Mapping[str, float]]:
        return {**super().tables(), "alphas": self.alphas}

    def alpha_at(self, path: str) -> float:
        """Return the numerator of the scaling that applies to the layer at ``path``."""
        usual = self.usual_scaling * self.rank_at(path)
        return at(path, self.alphas, usual if self.alpha is None else self.alpha)

    def scaling_at(self, path: str) -> float:
        """Return the scaling that applies to the layer at ``path``."""
        return self.alpha_at(path) / self.rank_at(path)
