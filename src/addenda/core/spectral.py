"""Updates by a few coefficients of a transform of the weight: where they lie, and how they reach the layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer, number, suffixes
from addenda.core.targets import matches, unmatched

__all__ = ["SpectralAdapter", "SpectralMethod", "drawn_places"]


def drawn_places(count: int, d_out: int, d_in: int, seed: int) -> Tensor:
    """Return ``count`` different places in a (d_out, d_in) matrix, counted row by row, as PEFT draws them."""
    return torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(seed))[:count]


class SpectralMethod(Method):
    """A method that trains a few coefficients of a transform of the weight's update."""

    coefficients: int
    """Trained coefficients of a layer."""
    scaling: float
    """Factor of the update."""
    seed: int
    """What the places of the coefficients are drawn from."""
    counts: Mapping[str, int]
    """Number of coefficients for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        """Return what is wrong with the settings."""
        found = integer("coefficients", self.coefficients) + integer("seed", self.seed, least=0)
        found += number("scaling", self.scaling, above=0.0)
        if not isinstance(self.counts, Mapping):
            return [*found, f"counts must map suffixes to whole numbers, got {self.counts!r}"]
        found += suffixes("keys of counts", list(self.counts))
        for suffix, count in self.counts.items():
            found += integer(f"counts[{suffix!r}]", count)
        return found

    def problems_at(self, base: Base) -> list[str]:
        """Return why the layer is too small."""
        count, weights = self.count_at(base.path), base.d_in * base.d_out
        return [f"{count} coefficients are more than its {weights} weights"] if count > weights else []

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        """Return which names of ``counts`` name no layer."""
        return [f"counts names no target by '{suffix}'" for suffix in unmatched(paths, self.counts)]

    def count_at(self, path: str) -> int:
        """Return how many coefficients the layer at ``path`` has."""
        named = [count for suffix, count in self.counts.items() if matches(path, suffix)]
        return [self.coefficients, *named][-1]

    def made(self, base: Base) -> tuple[nn.Parameter, Tensor]:
        """Return the spectrum and its places, (coefficients,) each."""
        count = self.count_at(base.path)

        def draw(places: Tensor, _: torch.Generator) -> None:
            places.copy_(drawn_places(count, base.d_out, base.d_in, self.seed))

        return base.parameter(count), base.constant(count, init=draw, dtype=torch.int64)


class SpectralAdapter(Adapter):
    """spectrum: (coefficients,); places: (coefficients,), whole numbers, row by row in (d_out, d_in); frozen."""

    additive = True
    places: Tensor

    def __init__(self, spectrum: nn.Parameter, places: Tensor, base: Base, settings: SpectralMethod) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.register_buffer("places", places)
        self.d_out, self.d_in, self.settings = base.d_out, base.d_in, settings

    def dense(self) -> Tensor:
        """Return the scaled coefficients at their places: (d_out, d_in)."""
        empty = self.spectrum.new_zeros(self.d_out * self.d_in)
        return empty.scatter(0, self.places, self.settings.scaling * self.spectrum).view(
            self.d_out, self.d_in
        )

    @abstractmethod
    def delta(self) -> Tensor:
        """Return what is added to the weight: (d_out, d_in)."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Return the adapted output, as the contract says."""
        return base(x) + base.apply(x, self.delta().to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the adapted weight and bias, as the contract says."""
        return weight + self.delta().to(weight.dtype), bias
