"""What PEFT's forms of LoHa and LoKr have in common: ranks and alphas by layer, and the layouts of convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from addenda.core.contract import Base
from addenda.core.handle import Handle
from addenda.core.layers import layer_at, view_of

__all__ = ["core_shape", "most_common", "patterns", "read_patterns", "volumes"]


class Ranked(Protocol):
    """A method whose rank and scaling may differ from layer to layer."""

    def rank_at(self, path: str) -> int:
        """Return the rank at ``path``."""

    def scaling_at(self, path: str) -> float:
        """Return the scaling at ``path``."""


def patterns(method: object, paths: Sequence[str]) -> dict[str, Any]:
    """Return ``r``, ``alpha`` and, for the layers that differ, their patterns."""
    ranked = cast(Ranked, method)
    ranks = {path: ranked.rank_at(path) for path in paths}
    # The way through the scaling costs the last bit; 12 digits give back the number that was set.
    alphas = {path: float(f"{ranked.scaling_at(path) * ranks[path]:.12g}") for path in paths}
    rank, own_ranks = most_common(ranks)
    alpha, own_alphas = most_common(alphas)
    return {"r": rank, "alpha": alpha, "rank_pattern": own_ranks, "alpha_pattern": own_alphas}


def most_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the value that most layers have, and those of the others by path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {path: value for path, value in values.items() if value != common}


def read_patterns(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings for ``r``, ``alpha`` and their patterns."""
    # PEFT takes the first pattern that matches, we the last suffix.
    ranks, alphas = (
        dict(reversed((config.get(key) or {}).items())) for key in ("rank_pattern", "alpha_pattern")
    )
    return {"rank": config.get("r", 8), "alpha": config.get("alpha", 8), "ranks": ranks, "alphas": alphas}


def core_shape(layer: Base) -> tuple[int, int]:
    """Return a convolution's kernel as PEFT shapes the cores of its Tucker form: a one-dimensional one gets a 1."""
    kernel = tuple(cast(Any, layer).module.kernel_size)
    return (*kernel, 1)[:2]


def volumes(handle: Handle) -> list[str]:
    """Return a problem where an adapted convolution is three-dimensional, which PEFT does not adapt."""
    layers = (view_of(layer_at(handle.model, path), path) for path in handle.paths)
    odd = [layer.path for layer in layers if layer.kind == "conv" and len(layer.module.kernel_size) > 2]
    return [f"PEFT adapts no three-dimensional convolution, first '{odd[0]}'"] if odd else []
