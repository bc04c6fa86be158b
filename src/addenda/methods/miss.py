"""MiSS: one small matrix, shared by all shards of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer, one_of
from addenda.core.registry import register

__all__ = ["MiSS"]

_MODES = ("balance", "bat", "mini")


@register("miss")
@dataclass(frozen=True)
class MiSS(Method):
    """Matrix shard sharing: the input is cut into shards of rank features, and all are mapped by the same matrix.

    balance:  y = base(x) + B (sum of the shards of x),    B: (d_out, rank)
    mini:     the same, B made of copies of one matrix (mini_rank, rank) below each other
    bat:      y_o = base(x)_o + sum over i of (W_oi + I) B_o x_i,   B_o: (rank, rank),  o: shard of the output

    A shard that x does not fill is padded with zeros. B starts at zero, so the adapted layer starts equal to its base.
    Mergeable exactly into an unquantized weight. Parameters per layer: rank * d_out (balance and bat), rank *
    mini_rank (mini).

    Args:
        rank: features of a shard, 1 <= rank <= d_in; for bat it has to divide d_in and d_out.
        mode: ``balance``, ``bat`` or ``mini``.
        mini_rank: rows of the matrix that ``mini`` repeats; has to divide d_out. Other modes do not use it.

    **Cost**: balance and mini take d_in additions and 2 * rank * d_out FLOP a row, about half of LoRA's, and keep
    rank numbers a row for the gradient. bat reads the weight in each forward: 2 * rank * d_in * d_out FLOP and a
    product with an update of the weight's size. **Use it when** memory and time matter most; it has no second factor
    to learn.

    **Learning rate**: 1e-4, the rate under which PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B)
    runs all three modes. One step of B moves d_in / rank weights at once, and no small factor damps it: rates that
    suit LoRA are too high.

    **Differs from**: nothing in the formulas; PEFT calls the mode ``init_weights``.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, MiSS(rank=2), targets=["0"]).trainable_parameters
        8

    References: Kang and Yin 2024, arXiv:2409.15371.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 7},
        {"rank": 4, "mode": "bat"},
        {"rank": 6, "mode": "mini", "mini_rank": 4},
    )

    rank: int = 64
    """Features of a shard."""
    mode: str = "balance"
    """balance, bat or mini."""
    mini_rank: int = 1
    """Rows of the matrix that mini repeats."""

    def problems(self) -> list[str]:
        return (
            integer("rank", self.rank)
            + one_of("mode", self.mode, _MODES)
            + integer("mini_rank", self.mini_rank)
        )

    def problems_at(self, base: Base) -> list[str]:
        if self.rank > base.d_in:
            return [f"rank {self.rank} exceeds d_in = {base.d_in}"]
        if self.mode == "bat" and (base.d_in % self.rank or base.d_out % self.rank):
            return [f"mode 'bat' needs a rank that divides d_in = {base.d_in} and d_out = {base.d_out}"]
        if self.mode == "mini" and base.d_out % self.mini_rank:
            return [f"mini_rank {self.mini_rank} does not divide d_out = {base.d_out}"]
        return []

    def build(self, base: Base) -> Adapter:
        if self.mode == "bat":
            return BatAdapter(base.parameter(base.d_out // self.rank, self.rank, self.rank))
        rows = self.mini_rank if self.mode == "mini" else base.d_out
        return MiSSAdapter(base.parameter(rows, self.rank), d_in=base.d_in, d_out=base.d_out)


class MiSSAdapter(Adapter):
    """B: (rows, rank); rows is d_out, or a divisor of it."""

    additive = True

    def __init__(self, B: nn.Parameter, *, d_in: int, d_out: int) -> None:
        super().__init__()
        self.B, self.d_in, self.copies = B, d_in, d_out // len(B)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        B = self.B.to(base.dtype)
        if not base.pointwise:
            return base(x) + base.low_rank(x, self._shards(B), B.repeat(self.copies, 1))
        rank = B.shape[1]
        shards = F.pad(x, (0, -self.d_in % rank)).reshape(-1, -(-self.d_in // rank), rank)
        term = (shards.sum(1) @ B.t()).repeat(1, self.copies)
        return base(x) + term.view(*x.shape[:-1], -1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        B = self.B.to(weight.dtype)
        return weight + B.repeat(self.copies, 1) @ self._shards(B), bias

    def _shards(self, like: Tensor) -> Tensor:
        """The sum over shards as a matrix, (rank, d_in)."""
        rank = like.shape[1]
        eye = torch.eye(rank, dtype=like.dtype, device=like.device)
        return eye.repeat(1, -(-self.d_in // rank))[:, : self.d_in]


class BatAdapter(Adapter):
    """B: (d_out / rank, rank, rank)."""

    additive = reads_weight = True

    def __init__(self, B: nn.Parameter) -> None:
        super().__init__()
        self.B = B

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + base.apply(x, self._delta(base.weight()))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self._delta(weight), bias

    def _delta(self, weight: Tensor) -> Tensor:
        B, rank = self.B.to(weight.dtype), self.B.shape[1]
        shards = weight.reshape(len(B), rank, -1, rank).transpose(1, 2)  # W_oi: (o, i, rank, rank)
        eye = torch.eye(rank, dtype=weight.dtype, device=weight.device)
        return ((shards + eye) @ B[:, None]).transpose(1, 2).reshape(weight.shape)
