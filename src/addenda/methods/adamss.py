"""AdaMSS: the rows of a weight fall into groups, and each group is changed within a few directions of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.starts import jointly

__all__ = ["AdaMSS", "AdaMSSAdapter", "clustered", "main_directions", "started"]

_GROUPING_SEED, _GROUPING_ROUNDS = 123456789, 10


@register("adamss")
@dataclass(frozen=True)
class AdaMSS(Method):
    """Multiple subspaces: one low-rank update for each group of similar rows.

    y_g = base(x)_g + B_g A_g V x,   V: (basis_rank, d_in),  A_g: (rank, basis_rank),  B_g: (rows of g, rank)

    V, frozen, are the weight's main right singular directions; a bias counts as one more column of the weight, and
    then V x stands for V (x, 1). The groups g are the clusters of the rows of the left singular vectors. A_g starts as
    the main directions of its group among them and B at zero, so the adapted layer starts equal to its base. Mergeable
    exactly into an unquantized weight. Parameters: rank * (d_out + subspaces * basis_rank) per layer.

    Args:
        basis_rank: singular directions that V keeps, >= 1; at most the smaller side of the weight counts.
        subspaces: number of groups, >= 1; at most d_out counts.
        rank: directions of each group, >= 1. A group of fewer rows uses as many as it has rows.
        seed: of the random start of the singular value decomposition.

    **Cost**: LoRA's of rank * subspaces, and the making of A V in each forward. V is kept with the adapter: basis_rank
    * d_in numbers a layer that are not trained. Attaching takes a decomposition of each weight. **Use it when** an
    adapter has to be much smaller than LoRA's of rank 1: with rank 1 it trains about d_out numbers a layer.

    **Learning rate**: 1e-4, that of PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B, rank 32).
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 3e-3.

    **Differs from**: the paper also takes whole subspaces out of the training as it goes on, by the importance of their
    gradients (PEFT's ``use_asa``); here all of them are trained to the end. The decomposition is always made on the
    CPU. PEFT's ``use_dynamic_rank`` is not read.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, AdaMSS(basis_rank=3, subspaces=2), targets=["0"]).trainable_parameters
        10

    References: AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"basis_rank": 12, "subspaces": 3, "rank": 2},
        {"subspaces": 4},
    )

    basis_rank: int = 100
    """Singular directions kept."""
    subspaces: int = 5
    """Number of groups."""
    rank: int = 1
    """Directions of each group."""
    seed: int = 0
    """Of the random start of the decomposition."""

    def problems(self) -> list[str]:
        found = integer("basis_rank", self.basis_rank) + integer("subspaces", self.subspaces)
        return found + integer("rank", self.rank) + integer("seed", self.seed, least=0)

    def build(self, base: Base) -> AdaMSSAdapter:
        columns, groups = base.d_in + base.has_bias, min(self.subspaces, base.d_out)
        directions = min(self.basis_rank, base.d_out, columns)
        first_a, v, group_of = jointly(
            lambda _: started(base, directions, groups, self.rank, seed=self.seed), 3
        )
        return AdaMSSAdapter(
            base.parameter(groups, self.rank, directions, init=first_a),
            base.parameter(base.d_out, self.rank),
            V=base.constant(directions, columns, init=v),
            groups=base.constant(base.d_out, init=group_of),
            d_in=base.d_in,
        )


def started(
    base: Base, directions: int, groups: int, rank: int, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (groups, rank, directions), V (directions, columns) and each row's group, with which a layer starts.

    They are the same for the same weight, bias and settings.
    """
    weight, bias = base.weight().float().cpu(), base.bias()
    if bias is not None:
        weight = torch.cat([weight, bias.float().cpu()[:, None]], dim=1)
    U, V = main_directions(weight, directions, seed=seed)
    group_of = clustered(U, groups)
    A = torch.zeros(groups, rank, directions)
    for group in range(groups):
        main = torch.linalg.svd(U[group_of == group], full_matrices=False)[2][:rank]
        A[group, : len(main)] = main
    return A, V, group_of


def main_directions(weight: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return the main left (rows, count) and right (count, columns) singular vectors, found by random projection."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.t()
    basis = tall @ torch.randn(tall.shape[1], count, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(basis)[0]
    for _ in range(2):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.t() @ basis)[0])[0]
    left, _, right = torch.linalg.svd(basis.t() @ tall, full_matrices=False)
    left = basis @ left
    return (left, right) if tall is weight else (right.t(), left.t())


def clustered(points: Tensor, count: int) -> Tensor:
    """Return the cluster of each point (n, d) by k-means from random points: at most ten rounds of Lloyd's."""
    import numpy

    points = points - points.mean(0)
    chances = numpy.full(len(points), 1.0, dtype=numpy.float32) / numpy.float32(len(points))
    chosen = numpy.random.RandomState(_GROUPING_SEED).choice(
        len(points), size=count, replace=False, p=chances
    )
    centres = points[torch.from_numpy(chosen)]
    nearest = torch.full((len(points),), -1)
    enough = 1e-4 * float(points.var(0, correction=0).mean())
    for _ in range(_GROUPING_ROUNDS):
        before, nearest = nearest, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, nearest):
            return nearest
        moved = _centres(points, centres, nearest)
        shift, centres = float((moved - centres).square().sum()), moved
        if shift <= enough:
            break
    return torch.cdist(points, centres).argmin(1)


def _centres(points: Tensor, centres: Tensor, nearest: Tensor) -> Tensor:
    """The mean of each cluster; one without a point gets that which is farthest from its own centre."""
    count = len(centres)
    sizes = torch.bincount(nearest, minlength=count).to(points.dtype)
    sums = torch.zeros_like(centres).index_add_(0, nearest, points)
    empty = (sizes == 0).nonzero()[:, 0]
    farthest = (points - centres[nearest]).square().sum(1).argsort(descending=True)
    for group, point in zip(empty.tolist(), farthest.tolist(), strict=False):
        sums[nearest[point]] -= points[point]
        sizes[nearest[point]] -= 1
        sums[group], sizes[group] = points[point], 1.0
    return sums / sizes[:, None]


class AdaMSSAdapter(Adapter):
    """A: (groups, rank, directions), B: (d_out, rank); frozen V: (directions, d_in or d_in + 1), groups: (d_out,)."""

    additive = True
    A: nn.Parameter
    B: nn.Parameter
    V: Tensor
    groups: Tensor

    def __init__(self, A: nn.Parameter, B: nn.Parameter, *, V: Tensor, groups: Tensor, d_in: int) -> None:
        super().__init__()
        self.hold(A=A, B=B, V=V, groups=groups)
        self.d_in = d_in

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.V.shape[1] > self.d_in else (*self._factors(), 1.0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self._factors()
        y = base.add_low_rank(x, A[:, : self.d_in], B, 1.0)
        if A.shape[1] == self.d_in:
            return y
        return base.outputs_back(base.outputs_last(y) + (B @ A[:, self.d_in]).to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self._factors()
        delta = (B @ A).to(weight.dtype)
        return weight + delta[:, : self.d_in], bias if bias is None else bias + delta[:, self.d_in]

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The update as a product of (groups * rank, columns) and (d_out, groups * rank)."""
        ours = self.groups[:, None] == torch.arange(len(self.A), device=self.groups.device)
        return self.A.flatten(0, 1) @ self.V, (ours[:, :, None] * self.B[:, None]).flatten(1)
