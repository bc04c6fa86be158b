"""Uni-LoRA: all factors of the whole model read from one trained vector."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Method, ParameterSource
from addenda.core.products import ProductAdapter
from addenda.core.ranges import integer
from addenda.core.registry import register

__all__ = ["UniLoRA"]


@register("unilora")
@dataclass(frozen=True)
class UniLoRA(Method):
    """Low-rank update of which every number is one of the few of a vector for the whole model.

    y = base(x) + B (A x),   A = (c * theta)[I_A]: (rank, d_in),   B = (c * theta)[I_B]: (d_out, rank)

    theta: (size,) is trained. The indices I are drawn once and balanced: of the N numbers in all factors of the model
    each entry of theta stands for floor(N / size) or one more, and c is one over the square root of how many. So the
    map from theta to the factors keeps lengths and angles. theta starts uniform in +-0.02, so the update starts small,
    not at zero. Mergeable exactly. Parameters: size, once for the whole model.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        size: length of the vector, >= 1.

    **Cost**: that of LoRA of the same rank, and one look-up for each number of the factors in each step. Gradients and
    optimiser shrink to `size` numbers; the indices take as many bytes as LoRA's factors.

    **Use it when** very few numbers are to be trained, or exchanged between machines.

    **Learning rate**: 1e-2. Of half decades 3e-2 was best on Banking77 with MiniLM (benchmarks/methods_quality), and
    1e-2 the next.

    **Differs from**: the paper draws each index by itself, PEFT and this balance them. The indices are saved with the
    adapter, because a generator's numbers are not promised to stay the same.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, UniLoRA(rank=2, size=10)).trainable_parameters
        10

    References: Li et al. 2025, arXiv:2506.00799, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 3, "size": 17},)
    exceptions: ClassVar[Mapping[str, str]] = {
        "identity": "a vector of zeros would give no gradient, and both factors are read from it"
    }

    rank: int = 4
    """Inner dimension of the update."""
    size: int = 8192
    """Numbers in the vector."""

    def problems(self) -> list[str]:
        return integer("rank", self.rank) + integer("size", self.size)

    def problems_at(self, base: Base) -> list[str]:
        limit = min(base.d_in, base.d_out)
        return [f"rank {self.rank} exceeds min(d_in, d_out) = {limit}"] if self.rank > limit else []

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        counts = {base.path: self.rank * (base.d_in + base.d_out) for base in bases}
        starts = itertools.accumulate(counts.values(), initial=0)
        total = sum(counts.values())
        return OneVector(
            source.parameter(self.size, init=_small_uniform),
            source.constant(
                total, dtype=torch.int32, init=lambda t, draws: t.copy_(_balanced(total, self.size, draws))
            ),
            source.constant(self.size, init=lambda t, _: t.copy_(_scales(total, self.size))),
            dict(zip(counts, starts, strict=False)),
        )

    def build(self, base: Base) -> UniLoRAAdapter:
        assert isinstance(base.common, OneVector)
        return UniLoRAAdapter(base.common.starts[base.path], self.rank, base.d_in, base.d_out)


def _small_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-0.02, 0.02, generator=generator)


def _balanced(total: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(total, generator=generator) % size


def _scales(total: int, size: int) -> Tensor:
    uses = total // size + (torch.arange(size) < total % size)
    return uses.clamp_min(1).double().rsqrt()


class OneVector(nn.Module):
    """theta: (size,), trained;  indices: (N,), scales: (size,), frozen; starts: where each layer's indices begin."""

    indices: Tensor
    scales: Tensor

    def __init__(self, theta: nn.Parameter, indices: Tensor, scales: Tensor, starts: dict[str, int]) -> None:
        super().__init__()
        self.theta, self.starts = theta, starts
        self.register_buffer("indices", indices)
        self.register_buffer("scales", scales)


class UniLoRAAdapter(ProductAdapter):
    """Nothing of its own: where its indices begin, and the sizes of its factors."""

    common: OneVector

    def __init__(self, start: int, rank: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.start, self.rank, self.d_in, self.d_out = start, rank, d_in, d_out

    def indices(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of the indices, (rank, d_in) and (d_out, rank), as views."""
        middle, end = self.start + self.rank * self.d_in, self.start + self.rank * (self.d_in + self.d_out)
        of_A, of_B = self.common.indices[self.start : middle], self.common.indices[middle:end]
        return of_A.view(self.rank, self.d_in), of_B.view(self.d_out, self.rank)

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        numbers = self.common.theta * self.common.scales
        A, B = (numbers.index_select(0, part.flatten()).view_as(part) for part in self.indices())
        return A, B, 1.0
