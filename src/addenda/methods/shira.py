"""SHiRA: sparse high-rank adapters, a few numbers of each weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Initializer, Method
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.remaking import remakable

__all__ = ["SHiRA", "SparseAdapter", "chosen", "sparse_adapter", "sparse_problems"]

_MASKS = ("random", "magnitude")


@register("shira")
@dataclass(frozen=True)
class SHiRA(Method):
    """Train a small share of the numbers of each weight, in their places, and leave the others.

    y = f(x; W + S),   S: (d_out, d_in), zero but at rank * (d_in + d_out) fixed places

    f is the layer's own operation. The places are chosen once and S starts at zero, so the adapted layer starts equal
    to its base. Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out) per layer, as many as
    LoRA of that rank has; the update itself may have any rank.

    Args:
        rank: sets how many numbers are trained, >= 1; at most d_in * d_out of them.
        mask: ``random`` places, or those of the largest numbers of the weight by ``magnitude``.

    Cost: W + S is formed in each forward and each backward of a linear layer and not kept (other kinds of layers keep
    it); the gradient of S takes the product that the gradient of W takes. Slower than LoRA in training; merged, it
    costs nothing.

    Use it when: several adapters have to be switched or added up on one merged model and should disturb each other
    and the base little.

    Learning rate: 3e-4, as PEFT's method comparison takes for it (Llama 3.2 3B, MetaMathQA).

    Differs from: the paper counts trained numbers as a share of the weight, this and PEFT by LoRA's rank. Its masks by
    gradient and by structure are not offered. Exchanging adapters in place is `Handle.merge` and `Handle.unmerge`.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, SHiRA(rank=1), targets=["0"]).trainable_parameters
        12

    References: Bhardwaj et al. 2024, arXiv:2406.13175, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 2}, {"rank": 1, "mask": "magnitude"})

    rank: int = 32
    """Sets the number of trained numbers, rank * (d_in + d_out)."""
    mask: str = "random"
    """Which numbers are trained: random or magnitude."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank)
        if self.mask not in _MASKS:
            found.append(f"mask must be one of {', '.join(_MASKS)}, got {self.mask!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        return sparse_problems(base, self.rank * (base.d_in + base.d_out))

    def build(self, base: Base) -> SparseAdapter:
        how = "random" if self.mask == "random" else "largest"
        return sparse_adapter(base, self.rank * (base.d_in + base.d_out), how)


def sparse_problems(base: Base, count: int) -> list[str]:
    """Return why ``count`` numbers of the layer's weight cannot be trained, one short sentence each."""
    numbers = base.d_in * base.d_out
    if not 1 <= count <= numbers:
        return [f"{count:,} of {numbers:,} numbers cannot be trained"]
    return ["its weight has more numbers than 32 bits count"] if numbers >= 2**31 else []


def sparse_adapter(base: Base, count: int, how: str) -> SparseAdapter:
    """Make an adapter of ``count`` values, which start at zero, at places that are `chosen` so."""
    places = base.constant(count, init=chosen(base, how), dtype=torch.int32)
    return SparseAdapter(base.parameter(count), places, shape=(base.d_out, base.d_in), how=how)


def chosen(base: Base, how: str) -> Initializer:
    """Return what fills in places in the layer's flat weight, each once.

    Args:
        base: the layer.
        how: ``random``, in ascending order; or those of the ``largest`` or the ``smallest`` numbers by magnitude.
    """

    def fill(places: Tensor, generator: torch.Generator) -> None:
        if how == "random":
            order = torch.randperm(base.d_in * base.d_out, generator=generator, dtype=torch.int32)
            places.copy_(order[: len(places)].sort().values)
        else:
            sizes = base.weight().abs().flatten()
            places.copy_(torch.topk(sizes, len(places), largest=how == "largest").indices)

    return fill


class SparseAdapter(Adapter):
    """values: (k,), places: (k,) whole numbers, places in the flattened (d_out, d_in) weight."""

    additive = True
    places: Tensor

    def __init__(self, values: nn.Parameter, places: Tensor, *, shape: tuple[int, int], how: str) -> None:
        super().__init__()
        self.values, self.shape = values, shape
        self.how = how
        """How the places were chosen."""
        self.register_buffer("places", places)

    def sparse(self) -> Tensor:
        """Return S as a dense (d_out, d_in) matrix, which need not be kept for the backward."""
        make = functools.partial(_dense, shape=self.shape)
        dense = make(self.values, self.places)
        return dense if torch.compiler.is_compiling() else remakable(dense, make, self.values, self.places)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.add_weight(x, self.sparse())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.sparse().to(weight.dtype), bias


def _dense(values: Tensor, places: Tensor, *, shape: tuple[int, int]) -> Tensor:
    return values.new_zeros(shape).view(-1).scatter_add(0, places.long(), values).view(shape)
