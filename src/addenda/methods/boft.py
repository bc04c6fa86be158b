"""BOFT: orthogonal fine-tuning by butterfly factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Method
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.rotation import FeatureMap, cayley, mapped_size, skew, times_blocks

__all__ = ["BOFT"]


@register("boft")
@dataclass(frozen=True)
class BOFT(Method):
    """Rotate the layer's input by a product of sparse rotations, and scale its output.

    y = s * (W (x R)) + bias,   R = B_m ... B_1: (d_in, d_in),   s: (d_out,)

    Each B_i is block-diagonal after a permutation: it rotates pairs of half blocks that lie 2^(i-1) half blocks apart,
    as a fast Fourier transform does, so that m factors of block size b mix 2^(m-1) * b features. A block is
    (I + Q) (I - Q)^-1 with Q skew-symmetric. Q starts at zero and s at one, so the adapted layer starts equal to its
    base. At an embedding the output is rotated. Mergeable exactly: the weight becomes s * (W R^T).
    Parameters: m * d_in * (b - 1) / 2 + d_out per layer.

    Args:
        block_size: b, >= 2; it divides the layer's width. With several factors it is even.
        blocks: number of blocks in a factor, instead of their size.
        factors: m, >= 1; block_size * 2^(m-1) divides the layer's width. With one, R is that of OFT.

    **Cost:** m * d_in * b multiplications per token beside LoRA's rank * (d_in + d_out), m activations of the layer's
    input kept, and m * d_in / b solves of size b a step.

    **Use it when** OFT's blocks are too narrow and larger ones cost too many parameters.

    **Learning rate:** 1e-4, that of PEFT's published comparison on MetaMathQA (Llama 3.2 3B, block size 4, one factor);
    not tuned here.

    Differs from: PEFT trains both triangles of a matrix and takes the difference, this one triangle, which gives the
    same rotations with less than half the parameters. PEFT needs its own CUDA kernel for more than one factor, and
    trains one without it; here the factors are reshapes and small products on any device. Dropout of whole blocks is
    left out.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, BOFT(block_size=2, factors=3), targets=["0"]).trainable_parameters
        16

    References: Liu et al. 2023, arXiv:2311.06243, section 4 (butterfly factorization).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"block_size": 4, "factors": 1},
        {"block_size": 2},
        {"blocks": 2},
    )

    block_size: int = 8
    """Size of a block."""
    blocks: int | None = None
    """Number of blocks, instead of their size."""
    factors: int = 2
    """Number of butterfly factors."""

    def problems(self) -> list[str]:
        found = integer("block_size", self.block_size, least=2) + integer("factors", self.factors)
        return found if self.blocks is None else found + integer("blocks", self.blocks)

    def problems_at(self, base: Base) -> list[str]:
        size = mapped_size(base)
        if self.blocks is not None and size % self.blocks:
            return [f"blocks = {self.blocks} does not divide its {size} features"]
        block = self.block_at(size)
        if block < 2:
            return [f"its {size} features fall into blocks of one, which cannot rotate"]
        if self.factors > 1 and block % 2:
            return [f"a block of {block} features cannot be halved, as several factors ask"]
        reach = block * 2 ** (self.factors - 1)
        return (
            [f"block_size * 2^(factors - 1) = {reach} does not divide its {size} features"]
            if size % reach
            else []
        )

    def block_at(self, size: int) -> int:
        """Return the size of a block of a layer with ``size`` features."""
        return self.block_size if self.blocks is None else size // self.blocks

    def build(self, base: Base) -> BOFTAdapter:
        size = mapped_size(base)
        block = self.block_at(size)
        generator = base.parameter(self.factors, size // block, block * (block - 1) // 2)
        return BOFTAdapter(generator, base.parameter(base.channels_out, init=1.0), base, block=block)


class BOFTAdapter(FeatureMap):
    """generator: (factors, blocks, b * (b - 1) / 2), above the diagonals of the Q; scale: (channels_out,)."""

    def __init__(self, generator: nn.Parameter, scale: nn.Parameter, base: Base, *, block: int) -> None:
        super().__init__(base)
        self.generator, self.scale = generator, scale
        self.block = block

    def rotations(self) -> Tensor:
        """Return the blocks of every factor: (factors, blocks, b, b)."""
        return cayley(skew(self.generator, self.block))

    def map(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        rotations = self.rotations().to(x.dtype)
        order = range(len(rotations)) if transposed else reversed(range(len(rotations)))
        for i in order:
            blocks = rotations[i].mT if transposed else rotations[i]
            if i == 0:  # neighbours: nothing to permute, and an odd block has no halves
                x = times_blocks(x, blocks)
                continue
            # Halves that lie 2^i apart come together, are rotated, and go back.
            half = torch.unflatten(x, -1, (-1, 2, 2**i, self.block // 2))
            paired = half.transpose(-3, -2)
            turned = times_blocks(paired.flatten(-4), blocks)
            x = turned.view(paired.shape).transpose(-3, -2).flatten(-4)
        return x

    def forward(self, x: Tensor, base: Base) -> Tensor:
        scale = self.scale.to(base.dtype)
        y = base.outputs_last(super().forward(x, base)) * scale
        bias = base.bias() if base.has_bias else None
        return base.outputs_back(y if bias is None else y + bias * (1 - scale))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned, _ = super().fold(weight, bias)
        return turned * self.scale.to(weight.dtype)[:, None], bias
