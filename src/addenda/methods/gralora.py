"""GraLoRA: the weight is cut into blocks, each with a low-rank update of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Initializer, Method
from addenda.core.ranges import integer, number
from addenda.core.registry import register

__all__ = ["GraLoRA"]


@register("gralora")
@dataclass(frozen=True)
class GraLoRA(Method):
    """Granular low-rank update: blocks ** 2 small updates, of the size of one large one.

    y_j = base(x)_j + scaling * sum over i of B_ji A_ij x_i,   i, j = 1 .. blocks,
    A_ij: (rank / blocks, d_in / blocks),  B_ji: (d_out / blocks, rank / blocks)

    x_i and y_j are the blocks of the input and the output. scaling = alpha / (rank + hybrid_rank). All A start
    uniform and all B zero, so the adapted layer starts equal to its base. Mergeable exactly into an unquantized
    weight. Parameters: (rank + hybrid_rank) * (d_in + d_out) per layer, as LoRA's.

    The update has rank up to blocks * rank, and an input feature of unusual size reaches the gradient of its own
    block of A alone, where in LoRA it reaches that of the whole update.

    Args:
        rank: parameters of the update, as LoRA's rank counts them; a multiple of blocks.
        alpha: numerator of the scaling, dimensionless, > 0. None means twice the ranks, that is a scaling of 2.
        blocks: into how many blocks each side is cut; has to divide d_in and d_out. 1 is LoRA.
        hybrid_rank: rank of a plain LoRA beside it, >= 0.

    **Cost**: LoRA's parameters and FLOP, in batched products of smaller matrices. A convolution and an embedding form
    the whole update once in each forward. **Use it when** LoRA of a high rank (64 and more) does worse than of a
    lower one, which is the case the paper starts from.

    **Learning rate**: 2e-4, that of PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B, rank 32).
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 3e-3.

    **Differs from**: nothing in the formula. PEFT advises 2 blocks up to a rank of 32 and 4 from 64.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, GraLoRA(rank=2), targets=["0"]).trainable_parameters
        24

    References: Jung et al. 2025, arXiv:2505.20355.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 2e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4},
        {"rank": 8, "blocks": 4, "alpha": 5.0, "hybrid_rank": 3},
    )

    rank: int = 32
    """Parameters of the update, as LoRA's rank counts them."""
    alpha: float | None = None
    """Numerator of the scaling; None means twice the ranks."""
    blocks: int = 2
    """Into how many blocks each side of the weight is cut."""
    hybrid_rank: int = 0
    """Rank of a plain LoRA beside it."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + integer("blocks", self.blocks)
        found += integer("hybrid_rank", self.hybrid_rank, least=0)
        if self.alpha is not None:
            found += number("alpha", self.alpha, above=0.0)
        if not found and self.rank % self.blocks:
            found.append(f"rank {self.rank} is no multiple of blocks = {self.blocks}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        sides = {"d_in": base.d_in, "d_out": base.d_out}
        return [
            f"{self.blocks} blocks do not divide {name} = {size}"
            for name, size in sides.items()
            if size % self.blocks
        ]

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        total = self.rank + self.hybrid_rank
        return (2.0 * total if self.alpha is None else self.alpha) / total

    def build(self, base: Base) -> GraLoRAAdapter:
        d_in, d_out = base.d_in // self.blocks, base.d_out // self.blocks
        hybrid = None
        if self.hybrid_rank:
            A = base.parameter(self.hybrid_rank, base.d_in, init=_uniform(base.d_in))
            hybrid = A, base.parameter(base.d_out, self.hybrid_rank)
        return GraLoRAAdapter(
            base.parameter(self.blocks, d_in, self.rank, init=_uniform(d_in)),
            base.parameter(self.blocks, self.rank, d_out),
            hybrid,
            scaling=self.scaling,
        )


def _uniform(inputs: int) -> Initializer:
    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-1, 1, generator=generator).div_(math.sqrt(inputs))

    return fill


class GraLoRAAdapter(Adapter):
    """A: (blocks, d_in / blocks, rank), B: (blocks, rank, d_out / blocks); A_hybrid: (hybrid_rank, d_in),
    B_hybrid: (d_out, hybrid_rank).

    A[i] holds A_i1 .. A_ik beside each other and B[j] holds B_j1 .. B_jk, so each is a single product.
    """

    additive = True

    def __init__(
        self,
        A: nn.Parameter,
        B: nn.Parameter,
        hybrid: tuple[nn.Parameter, nn.Parameter] | None,
        *,
        scaling: float,
    ) -> None:
        super().__init__()
        self.A, self.B = A, B
        self.A_hybrid: nn.Parameter | None = hybrid[0] if hybrid else None
        self.B_hybrid: nn.Parameter | None = hybrid[1] if hybrid else None
        self.scaling = scaling

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.A_hybrid is None or self.B_hybrid is None:
            y = base(x)
        else:
            y = base.add_low_rank(x, self.A_hybrid, self.B_hybrid, self.scaling)
        if not base.pointwise:
            return y + base.apply(x, self._delta().to(base.dtype))
        return y + self.scaling * self._blockwise(x, base.dtype)

    def _blockwise(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        A, B, blocks = self.A.to(dtype), self.B.to(dtype), len(self.A)
        h = x.reshape(-1, blocks, A.shape[1]).transpose(0, 1) @ A  # (i, rows, rank)
        h = h.view(blocks, -1, blocks, h.shape[2] // blocks).transpose(0, 2).flatten(2)  # (j, rows, rank)
        return (h @ B).transpose(0, 1).reshape(*x.shape[:-1], -1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self._delta()
        if self.A_hybrid is not None and self.B_hybrid is not None:
            delta = delta + self.scaling * self.B_hybrid @ self.A_hybrid
        return weight + delta.to(weight.dtype), bias

    def _delta(self) -> Tensor:
        blocks, d_in, rank = self.A.shape
        A, B = self.A.view(blocks, d_in, blocks, -1), self.B.view(blocks, blocks, rank // blocks, -1)
        delta = torch.einsum("icjr,jiro->joic", A, B)
        return self.scaling * delta.flatten(2).flatten(0, 1)
