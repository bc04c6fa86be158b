"""OFT: orthogonal fine-tuning, a rotation of the input in blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import flag, integer, number
from addenda.core.registry import register
from addenda.core.rotation import (
    FeatureMap,
    cayley,
    cayley_neumann,
    mapped_size,
    nearest_divisor,
    skew,
    times_blocks,
)

__all__ = ["OFT"]


@register("oft")
@dataclass(frozen=True)
class OFT(Method):
    """Rotate the layer's input by a trained block-diagonal orthogonal matrix.

    y = base(x R),   R = diag(R_1, ..., R_n): (d_in, d_in),   R_i = (I + Q_i) (I - Q_i)^-1,   Q_i = -Q_i^T: (b, b)

    The entries of Q_i above the diagonal are trained. They start at zero, so the adapted layer starts equal to its
    base. The angles between the rows of the weight stay as they are. At an embedding the output is rotated.
    Mergeable exactly: the weight becomes W R^T. Parameters: d_in * (b - 1) / 2 per layer, b of them fewer in each
    block of a shared rotation.

    Args:
        block_size: b, >= 2; a layer whose width it does not divide takes the divisor of its width nearest to it.
        blocks: n, the number of blocks, instead of their size; likewise.
        shared: one rotation for all blocks of a layer, which divides the parameters by n.
        exact: solve for R_i; otherwise its inverse is a series, which is faster and orthogonal only while Q is small.
        terms: terms of the series, >= 2, used where not exact.
        freedom: constrained OFT: the largest Frobenius norm of Q_i, times sqrt(n) (or 1 where shared), > 0. None
            means no limit.

    **Cost:** d_in * b multiplications per token beside LoRA's rank * (d_in + d_out), and n solves of size b a step. An
    activation of the layer's input is kept, none of the weight's size.

    **Use it when** what the base knows has to survive: a rotation cannot scale features up or down.

    **Learning rate:** 1e-4, that of PEFT's published comparison on MetaMathQA (Llama 3.2 3B, 32 blocks a layer); not
    tuned here.

    Differs from: the paper rotates the weight, this (as OFTv2) the activations. PEFT's default is the series of five
    terms, here the exact rotation, which is orthogonal to rounding. Dropout of whole blocks is left out.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, OFT(block_size=4), targets=["0"]).trainable_parameters
        12

    References: Qiu et al. 2023, arXiv:2306.07280, section 3. Qiu et al. 2025, arXiv:2506.19847 (OFTv2: input side,
    Cayley-Neumann).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"block_size": 4},
        {"blocks": 3, "shared": True, "exact": False},
        {"block_size": 6, "freedom": 0.5, "exact": False, "terms": 7},
    )

    block_size: int = 32
    """Size of a block."""
    blocks: int | None = None
    """Number of blocks, instead of their size."""
    shared: bool = False
    """One rotation for all blocks."""
    exact: bool = True
    """Solve for the rotation instead of taking a series."""
    terms: int = 5
    """Terms of the series."""
    freedom: float | None = None
    """Limit of the rotation in constrained OFT."""

    def problems(self) -> list[str]:
        found = integer("block_size", self.block_size, least=2) + integer("terms", self.terms, least=2)
        found += flag("shared", self.shared) + flag("exact", self.exact)
        if self.blocks is not None:
            found += integer("blocks", self.blocks)
        if self.freedom is not None:
            found += number("freedom", self.freedom, above=0.0)
        return found

    def problems_at(self, base: Base) -> list[str]:
        size = mapped_size(base)
        return (
            [f"its {size} features fall into blocks of one, which cannot rotate"]
            if self.block_at(size) < 2
            else []
        )

    def block_at(self, size: int) -> int:
        """Return the size of a block of a layer with ``size`` features."""
        if self.blocks is None:
            return nearest_divisor(size, self.block_size)
        return size // nearest_divisor(size, self.blocks)

    def build(self, base: Base) -> OFTAdapter:
        size = mapped_size(base)
        block = self.block_at(size)
        generator = base.parameter(1 if self.shared else size // block, block * (block - 1) // 2)
        return OFTAdapter(generator, base, block=block, settings=self)

    def after_update(self, adapters: Mapping[str, Adapter], *, step: int, of_steps: int) -> None:
        for adapter in adapters.values():
            cast(OFTAdapter, adapter).project()


class OFTAdapter(FeatureMap):
    """generator: (blocks, b * (b - 1) / 2), what lies above the diagonal of each Q; one row where it is shared."""

    def __init__(self, generator: nn.Parameter, base: Base, *, block: int, settings: OFT) -> None:
        super().__init__(base)
        self.generator = generator
        self.block, self.settings = block, settings

    def rotations(self) -> Tensor:
        """Return the blocks R_i: (blocks, b, b)."""
        Q = skew(self.generator * self._shrink(), self.block)
        return cayley(Q) if self.settings.exact else cayley_neumann(Q, self.settings.terms)

    def project(self) -> None:
        """Bring what has gone beyond the freedom back to it."""
        self.generator.mul_(self._shrink())

    def _shrink(self) -> Tensor | float:
        if self.settings.freedom is None:
            return 1.0
        largest = self.settings.freedom / math.sqrt(len(self.generator))
        norm = math.sqrt(2) * self.generator.detach().norm(dim=1, keepdim=True)
        return torch.clamp(largest / norm, max=1.0)

    def map(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        R = self.rotations().to(x.dtype)
        return times_blocks(x, R.mT if transposed else R)
