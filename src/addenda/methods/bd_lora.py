"""BD-LoRA: one factor of the update is block-diagonal, so that devices that share a layer need not exchange A x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import integer, suffixes
from addenda.core.registry import register
from addenda.core.targets import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS, matches
from addenda.methods.lora import LoRAAdapter, LowRank

__all__ = ["BDLoRA"]


@register("bd-lora")
@dataclass(frozen=True)
class BDLoRA(LowRank):
    """Low-rank update with one factor in blocks along its diagonal: B, or A where a layer's inputs are divided.

    y = base(x) + scaling * B (A x),   A = diag(A_1 .. A_n) or B = diag(B_1 .. B_n),   n = blocks

    A_i: (rank / n, d_in / n) where A is in blocks, and B is (d_out, rank); B_i: (d_out / n, rank / n) where B is, and A
    is (rank, d_in). A starts Kaiming-uniform, each block by its own width, and B zero, so the adapted layer starts
    equal to its base. Mergeable exactly into an unquantized weight. Parameters per layer: rank * (d_in / n + d_out) or
    rank * (d_in + d_out / n).

    Args:
        rank: inner dimension, a multiple of ``blocks``, 1 <= rank <= min(d_in, d_out). As a block has fewer
            parameters, a larger one than LoRA's costs the same.
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.
        blocks: blocks on the diagonal, >= 1: as many as devices that will share a layer. They have to divide the side
            of the layer that is cut.
        divided_inputs: literal suffixes of the layers whose inputs the devices share out, and whose A is in blocks:
            the outputs of attention and feed-forward under the names that well-known models use.
        undivided: literal suffixes of layers with whole factors, as LoRA's.

    **Cost**: LoRA's of the same rank: the zeros between the blocks are computed with. Only a server that divides a
    layer saves something: the sum of A x over its devices.

    **Use it when** many adapters are served on several devices that share each layer.

    **Learning rate**: LoRA's default; not tuned.

    **Differs from**: PEFT is told both lists of layers and starts A by U(-k, k) with a larger k.

    Example:
        >>> import addenda
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> addenda.attach(model, BDLoRA(rank=2, blocks=2), targets=["0"]).trainable_parameters
        20

    References: Wang et al. 2025, arXiv:2510.23346.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4},
        {"rank": 8, "blocks": 4, "alpha": 5.0, "divided_inputs": ("layer",)},
    )

    blocks: int = 2
    """Blocks on the diagonal."""
    divided_inputs: tuple[str, ...] = ATTENTION_OUTPUTS + FEED_FORWARD_OUTPUTS
    """Literal suffixes of the layers whose A is in blocks."""
    undivided: tuple[str, ...] = ()
    """Literal suffixes of layers with whole factors."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("blocks", self.blocks)
        return found + suffixes("divided_inputs", self.divided_inputs) + suffixes("undivided", self.undivided)

    def problems_at(self, base: Base) -> list[str]:
        in_blocks = self.in_blocks(base.path)
        sides = {
            "rank": (self.rank_at(base.path), bool(in_blocks)),
            "d_in": (base.d_in, in_blocks == "A"),
            "d_out": (base.d_out, in_blocks == "B"),
        }
        return super().problems_at(base) + [
            f"blocks {self.blocks} does not divide {name} {size}"
            for name, (size, cut) in sides.items()
            if cut and size % self.blocks
        ]

    def in_blocks(self, path: str) -> str | None:
        """Return which factor of the layer at ``path`` is in blocks, "A" or "B", or None."""
        if any(matches(path, suffix) for suffix in self.undivided):
            return None
        return "A" if any(matches(path, suffix) for suffix in self.divided_inputs) else "B"

    def build(self, base: Base) -> BDLoRAAdapter:
        rank, in_blocks = self.rank_at(base.path), self.in_blocks(base.path)
        columns_a = base.d_in // self.blocks if in_blocks == "A" else base.d_in
        columns_b = rank // self.blocks if in_blocks == "B" else rank
        A, B = base.parameter(rank, columns_a, init=kaiming_uniform), base.parameter(base.d_out, columns_b)
        adapter = BDLoRAAdapter(A, B, self.scaling_at(base.path), dropout=self.dropout)
        adapter.in_blocks, adapter.blocks = in_blocks, self.blocks
        return adapter


class BDLoRAAdapter(LoRAAdapter):
    """A: (rank, d_in), B: (d_out, rank); the one in blocks is so many times narrower, with one block under another."""

    in_blocks: str | None = None
    blocks: int = 1

    def factors(self) -> tuple[Tensor, Tensor]:
        whole = {"A": self.A, "B": self.B}
        if self.in_blocks is not None:
            blocks = whole[self.in_blocks].chunk(self.blocks)
            whole[self.in_blocks] = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return whole["A"], whole["B"]
