"""TinyLoRA: a handful of numbers that weigh random mixtures of a weight's main directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Method, ParameterSource
from addenda.core.decomposition import leading_svd
from addenda.core.products import ProductAdapter
from addenda.core.ranges import integer, number
from addenda.core.registry import register
from addenda.core.starts import jointly

__all__ = ["TinyLoRA"]


@register("tinylora")
@dataclass(frozen=True)
class TinyLoRA(Method):
    """Update between a weight's largest singular directions, steered by a vector of a few numbers.

    y = base(x) + B (R (A x)),   R = sum over i of v_i P_i,   W = U diag(s) V^T
    A = diag(sqrt(s)) V^T: (rank, d_in),   B = U diag(sqrt(s)): (d_out, rank),   P: (size, rank, rank),   v: (size,)

    A and B are the `rank` largest singular triples of the frozen weight, the P_i are random, N(0, 1 / rank); all stay
    frozen. Only v is trained, and layers may share it. v starts at zero, so the adapted layer starts equal to its
    base. Mergeable exactly. Parameters: size for each vector; one vector a layer, or fewer by `tying`.

    Args:
        rank: how many singular directions, 1 <= rank <= min(d_in, d_out).
        size: numbers in a vector, >= 1.
        tying: how far layers share vectors, in [0, 1]: of n layers, round(n * (1 - tying)) have a vector of their own
            with their neighbours in the model; at 1 there is one vector for all.

    **Cost**: that of LoRA of the same rank; attaching takes a singular value decomposition of every weight.

    **Use it when** next to nothing is to be trained: the paper does reinforcement learning with 13 numbers.

    **Learning rate**: 1e-3. The update moves by about sqrt(size / rank) times the rate, in parts of the largest
    singular value. Not tuned.

    **Differs from**: the paper does not say from what the P are drawn; this takes PEFT's choice. A, B and P are saved
    with the adapter, because neither signs of singular vectors nor a generator's numbers are promised to stay the same.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, TinyLoRA(size=3, tying=1.0)).trainable_parameters
        3

    References: arXiv:2602.04118. Bałazy et al. 2024, arXiv:2405.17604 (training R alone).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 3, "size": 5},
        {"size": 7, "tying": 1.0},
    )

    rank: int = 2
    """Singular directions of the weight."""
    size: int = 64
    """Numbers in a vector."""
    tying: float = 0.0
    """How far layers share vectors: 0 not at all, 1 all of them."""

    def problems(self) -> list[str]:
        found = (
            integer("rank", self.rank) + integer("size", self.size) + number("tying", self.tying, least=0.0)
        )
        if not found and self.tying > 1:
            found.append(f"tying must be at most 1, got {self.tying!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        limit = min(base.d_in, base.d_out)
        return [f"rank {self.rank} exceeds min(d_in, d_out) = {limit}"] if self.rank > limit else []

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        count = max(1, round(len(bases) * (1 - self.tying)))
        neighbours = max(1, len(bases) // count)
        groups = {base.path: min(i // neighbours, count - 1) for i, base in enumerate(bases)}
        return Vectors([source.parameter(self.size) for _ in range(count)], groups)

    def build(self, base: Base) -> TinyLoRAAdapter:
        assert isinstance(base.common, Vectors)
        first, second = jointly(lambda _: _main_directions(base.weight(), self.rank), 2)
        return TinyLoRAAdapter(
            base.constant(self.rank, base.d_in, init=first),
            base.constant(base.d_out, self.rank, init=second),
            base.constant(
                self.size,
                self.rank,
                self.rank,
                init=lambda P, draws: P.normal_(0, self.rank**-0.5, generator=draws),
            ),
            group=base.common.groups[base.path],
        )


def _main_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, s, Vt = leading_svd(weight.float(), rank)
    root = s.sqrt()
    return root[:, None] * Vt, U * root


class Vectors(nn.Module):
    """v: vectors of (size,) each; groups: which of them each layer has, by path."""

    def __init__(self, v: Sequence[nn.Parameter], groups: dict[str, int]) -> None:
        super().__init__()
        self.v, self.groups = nn.ParameterList(v), groups


class TinyLoRAAdapter(ProductAdapter):
    """A: (rank, d_in), B: (d_out, rank), P: (size, rank, rank); frozen."""

    common: Vectors
    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, A: Tensor, B: Tensor, P: Tensor, *, group: int) -> None:
        super().__init__()
        self.hold(A=A, B=B, P=P)
        self.group = group

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        R = torch.einsum("i,ijk->jk", self.common.v[self.group], self.P)
        return R @ self.A, self.B, 1.0
