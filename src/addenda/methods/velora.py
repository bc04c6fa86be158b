"""VeLoRA: LoRA that keeps one number for each group of input features until the backward, in place of the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from addenda.core.contract import Base
from addenda.core.ranges import integer, number, one_of
from addenda.core.registry import register
from addenda.methods.lora import LoRAAdapter, LowRank

__all__ = ["VeLoRA"]

_DIRECTIONS = ("once", "each", "random")


@register("velora")
@dataclass(frozen=True)
class VeLoRA(LowRank):
    """Low-rank update whose A learns from a compressed input: each group of features by its share in one direction.

    y = base(x) + scaling * B (A x);   for the gradient of A, x is taken as  scale * (x_g . v) v  in each group x_g

    A: (rank, d_in),  B: (d_out, rank),  v: (d_in / groups,), of length 1, frozen; the last group is filled up with
    zeros. What is computed is LoRA, and so are the gradients of B and of x; that of A is an approximation. A starts
    Kaiming-uniform and B zero, so the adapted layer starts equal to its base. Mergeable exactly into an unquantized
    weight. Parameters: rank * (d_in + d_out) per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.
        groups: into how many groups the features are divided, >= 1; more keep more of the input.
        scale: factor on what is taken for the input, > 0.
        direction: where v comes from: the mean group of the first pass that trains (``once``), of ``each`` such pass,
            or ``random``. The first two depend on how the rows are cut into micro-batches and dealt to processes.

    **Cost**: LoRA's, 2 * d_in FLOP a token to compress and rank * d_in multiplications a pass to spread the gradient; a
    layer keeps groups numbers a token where LoRA keeps its d_in inputs, if nothing else needs these.

    **Use it when** the memory of activations limits what fits, and A should learn all the same.

    **Learning rate**: LoRA's default; not tuned, nor are groups and scale, which are PEFT's defaults.

    **Differs from**: PEFT's default takes each pass's mean, the paper and this the first one's.

    Example:
        >>> import addenda
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> addenda.attach(model, VeLoRA(rank=2, groups=4), targets=["0"]).trainable_parameters
        24

    References: Miles et al. 2024, arXiv:2405.17991.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        # The properties compare gradients of rows run together and apart, which have other means.
        {"rank": 4, "groups": 6, "direction": "random"},
        {"rank": 3, "groups": 7, "direction": "random", "scale": 0.5, "alpha": 5.0},
    )

    groups: int = 64
    """Into how many groups the input's features are divided."""
    scale: float = 1.0
    """Factor on what is taken for the input."""
    direction: str = "once"
    """Where the direction comes from."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("groups", self.groups) + number("scale", self.scale, above=0.0)
        return found + one_of("direction", self.direction, _DIRECTIONS)

    def build(self, base: Base) -> VeLoRAAdapter:
        init = _random_direction if self.direction == "random" else 0.0
        v = base.constant(-(-base.d_in // self.groups), init=init)
        adapter = VeLoRAAdapter(*self.pair_for(base), self.scaling_at(base.path), dropout=self.dropout)
        adapter.hold(v=v)
        adapter.groups, adapter.scale, adapter.direction = self.groups, self.scale, self.direction
        return adapter


def _random_direction(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)
    tensor.copy_(F.normalize(tensor, dim=0))


class VeLoRAAdapter(LoRAAdapter):
    """A: (rank, d_in), B: (d_out, rank), v: (d_in / groups,), zero until there is one."""

    v: Tensor
    groups: int
    scale: float
    direction: str

    def _compresses(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self._compresses() else super().low_rank_term()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self._compresses():
            return super().forward(x, base)
        seen = F.dropout(x, self.dropout)
        if self.direction == "each" or (self.direction == "once" and not self.v.any()):
            mean = in_groups(seen.detach(), self.groups).flatten(0, -2).mean(dim=0)
            self.v.copy_(F.normalize(mean.to(self.v.dtype), dim=0))
        compressed: Tensor = _Compressed.apply(seen, self.A, self.v, self.groups, self.scale)  # type: ignore[no-untyped-call]
        return base(x) + self.scaling * F.linear(compressed, self.B.to(base.dtype))


def in_groups(x: Tensor, groups: int) -> Tensor:
    """Divide the features of x (..., d_in) as (..., groups, width), the last group filled up with zeros.

    Example:
        >>> in_groups(torch.arange(3), 2).tolist()
        [[0, 1], [2, 0]]
    """
    width = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * width - x.shape[-1])).view(*x.shape[:-1], groups, width)


class _Compressed(torch.autograd.Function):
    """A x, which keeps of x its shares in v alone, (rows, groups)."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position only)
        ctx: Any, x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward((in_groups(x, groups) @ v.to(x.dtype)).flatten(0, -2), A, v)
        ctx.scale, ctx.shape = scale, x.shape
        return F.linear(x, A.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shares, A, v = ctx.saved_tensors
        dx = g @ A.to(g.dtype) if ctx.needs_input_grad[0] else None
        spread = (g.flatten(0, -2).t() @ shares).to(A.dtype)[..., None] * (ctx.scale * v)
        return dx, spread.flatten(1)[:, : ctx.shape[-1]], None, None, None
