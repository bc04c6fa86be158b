"""DoRA: the length of each row of the weight and its direction, trained apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.registry import register
from addenda.methods.lora import LowRank, add_low_rank

__all__ = ["DoRA"]


@register("dora")
@dataclass(frozen=True)
class DoRA(LowRank):
    """Low-rank update of the weight's direction, with the length of each of its rows trained beside it.

    y = m / n * ((W + scaling * B A) x) + bias,   n = the norms of the rows of W + scaling * B A
    A: (rank, d_in),  B: (d_out, rank),  m, n: (d_out,)

    A row of W is what gives one output feature. m starts as the norms of the rows of W, A Kaiming-uniform and B zero,
    so the adapted layer starts equal to its base. n follows A and B, and counts as a constant in the gradient.
    Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out) + d_out per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.

    **Cost**: beside LoRA's, n once a forward, 2 * rank * d_in * d_out FLOP (as much as the frozen product of ``rank``
    tokens), and two passes over the output; d_out numbers more are kept. W + scaling * B A is never formed, and a
    packed weight not unpacked.
    **Use it when** LoRA of a low rank falls short and its speed is not what limits; merge before answering one token
    at a time.
    **Learning rate**: LoRA's default, which suits the same scaling; not tuned.

    Differs from: the paper and PEFT drop input features for the frozen product as well, which runs it twice; here
    dropout touches A alone.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, DoRA(rank=2), targets=["0"]).trainable_parameters
        28

    References: Liu et al. 2024, arXiv:2402.09353, sections 4.1 and 4.3 (equation 11).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4},
        {"rank": 3, "alpha": 5.0, "rank_stabilized": True},
    )

    def build(self, base: Base) -> DoRAAdapter:
        A, B = self.pair_for(base)
        squares = base.constant(base.d_out, init=lambda t, _: t.copy_(squared_rows(base.weight())))
        m = base.parameter(base.d_out, init=lambda t, _: t.copy_(squares.sqrt()))
        return DoRAAdapter(A, B, m, squares, scaling=self.scaling_at(base.path), dropout=self.dropout)


def squared_rows(weight: Tensor) -> Tensor:
    """Return the squared norm of each row of (d_out, d_in) as (d_out,), in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    return norms.square()


class DoRAAdapter(Adapter):
    """A: (rank, d_in), B: (d_out, rank), m: (d_out,); squares: (d_out,), the squared norms of W's rows, frozen."""

    reads_weight = True
    squares: Tensor

    def __init__(
        self,
        A: nn.Parameter,
        B: nn.Parameter,
        m: nn.Parameter,
        squares: Tensor,
        *,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.A, self.B, self.m = A, B, m
        self.register_buffer("squares", squares)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = add_low_rank(x, base, self.A, self.B, self.scaling, dropout=self.dropout * self.training)
        last = base.outputs_last(y)
        with torch.no_grad():
            norms = self._norms(base.mapped(self.A))
        # What a long row lacks or has too much is a small number, which half precision keeps better than the factor.
        excess = (self.m / norms - 1).to(base.dtype)
        bias = base.bias()
        return base.outputs_back(last + excess * (last if bias is None else last - bias))

    def _norms(self, mapped: Tensor) -> Tensor:
        """The norms of the rows of W + s B A: |W|^2 + 2 s <W, B A> + s^2 |B A|^2, given A W^T: (rank, d_out)."""
        A, B, s = self.A, self.B, self.scaling
        cross = 2 * mapped.t().to(B.dtype) + s * (B @ (A @ A.t()))
        squares = self.squares + s * (B * cross).sum(dim=1)
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A = self.A.to(weight.dtype)
        factor = self.m.to(weight.dtype) / self._norms(A @ weight.t()).to(weight.dtype)
        return factor[:, None] * (weight + self.scaling * (self.B.to(weight.dtype) @ A)), bias
