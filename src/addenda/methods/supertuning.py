"""Super-tuning: the largest numbers of each weight, and beside them, where it is asked for, a low-rank update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import flag, integer, number
from addenda.core.registry import register
from addenda.methods.shira import SparseAdapter, sparse_adapter, sparse_problems

__all__ = ["SuperTuning", "SupraAdapter"]


@register("supertuning")
@dataclass(frozen=True)
class SuperTuning(Method):
    """Train the largest numbers of each weight; "Supra" adds a low-rank update.

    y = f(x; W + S)                                   rank 0, "Super"
    y = f(x; W + S) + scaling * f(x; B A)             "Supra"

    S: (d_out, d_in), zero but at (1 - sparsity) * d_in * d_out fixed places;  A: (rank, d_in),  B: (d_out, rank)

    f is the layer's own operation without its bias, scaling = alpha / rank. S and B start at zero, A Kaiming-uniform,
    so the adapted layer starts equal to its base. Mergeable exactly into an unquantized weight. Parameters per layer:
    (1 - sparsity) * d_in * d_out, and rank * (d_in + d_out) for the low-rank part.

    Args:
        sparsity: share of the numbers that are not trained, in [0, 1).
        smallest: train the smallest numbers instead of the largest.
        rank: of the low-rank part; 0 leaves it out.
        alpha: numerator of its scaling, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).

    Cost: as SHiRA's: W + S is formed in each forward and backward, and S takes the product that a gradient of W
    takes. The low-rank part costs what LoRA costs.

    Use it when: an update by a share of the weight is wanted and no calibration data; which end of the magnitudes
    serves better depends on model and task, as PEFT reports of the paper.

    Learning rate: 1e-4, PEFT's method comparison's own for all its runs of it (Llama 3.2 3B, MetaMathQA).
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 3e-3.

    Differs from: the paper scores weights by activations too; here, as in PEFT, by magnitude alone, which needs no
    data.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, SuperTuning(sparsity=0.75, rank=1), targets=["0"]).trainable_parameters
        20

    References: arXiv:2607.09287.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"sparsity": 0.8},
        {"sparsity": 0.9, "smallest": True, "rank": 2, "alpha": 3.0},
    )

    sparsity: float = 0.99
    """Share of the numbers that are not trained."""
    smallest: bool = False
    """Train the smallest numbers instead of the largest."""
    rank: int = 0
    """Inner dimension of the low-rank part; 0 leaves it out."""
    alpha: float | None = None
    """Numerator of its scaling; None means 2 * rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of A during training."""

    def problems(self) -> list[str]:
        found = number("sparsity", self.sparsity, least=0.0, below=1.0) + flag("smallest", self.smallest)
        found += integer("rank", self.rank, least=0) + number("dropout", self.dropout, least=0.0, below=1.0)
        if self.alpha is not None:
            found += number("alpha", self.alpha, above=0.0)
        if not found and self.rank == 0 and (self.alpha is not None or self.dropout):
            found.append("alpha and dropout belong to the low-rank part: they ask for a rank")
        return found

    def problems_at(self, base: Base) -> list[str]:
        found = sparse_problems(base, self.count_at(base))
        if self.rank > min(base.d_in, base.d_out):
            found.append(f"rank {self.rank} exceeds min(d_in, d_out) = {min(base.d_in, base.d_out)}")
        if self.dropout and base.channels_in is None:
            found.append("its input holds indices, which dropout cannot thin")
        return found

    def count_at(self, base: Base) -> int:
        """Return how many numbers of the layer's weight are trained."""
        return int(base.d_in * base.d_out * (1 - self.sparsity))

    def build(self, base: Base) -> SparseAdapter | SupraAdapter:
        sparse = sparse_adapter(base, self.count_at(base), "smallest" if self.smallest else "largest")
        if not self.rank:
            return sparse
        A = base.parameter(self.rank, base.d_in, init=kaiming_uniform)
        scaling = 2.0 if self.alpha is None else self.alpha / self.rank
        return SupraAdapter(sparse, A, base.parameter(base.d_out, self.rank), scaling, self.dropout)


class SupraAdapter(Adapter):
    """sparse: the values and their places; A: (rank, d_in), B: (d_out, rank)."""

    additive = True

    def __init__(
        self, sparse: SparseAdapter, A: nn.Parameter, B: nn.Parameter, scaling: float, dropout: float
    ) -> None:
        super().__init__()
        self.sparse, self.A, self.B = sparse, A, B
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor, base: Base) -> Tensor:
        thinned = F.dropout(x, self.dropout) if self.training and self.dropout else x
        A, B = self.A.to(base.dtype), self.B.to(base.dtype)
        return self.sparse.forward(x, base) + self.scaling * base.low_rank(thinned, A, B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update = self.scaling * (self.B.to(weight.dtype) @ self.A.to(weight.dtype))
        return self.sparse.fold(weight + update, bias)
