"""VB-LoRA: factors put together from sub-vectors of one bank that all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Method, ParameterSource
from addenda.core.products import ProductAdapter
from addenda.core.ranges import integer
from addenda.core.registry import register

__all__ = ["VBLoRA"]


@register("vblora")
@dataclass(frozen=True)
class VBLoRA(Method):
    """Low-rank update whose factors are mixtures of a few vectors out of a bank for the whole model.

    y = base(x) + B (A x),   A: (rank, d_in),  B: (d_out, rank)

    Each row of A, and each column of B, is cut into pieces of `length` numbers. A piece is a sum of the `top` vectors
    of the bank (vectors, length) whose logits are largest, weighted by the softmax over these `top` logits. Bank and
    logits are trained; which vectors are chosen may change with every step. The bank starts uniform in +-0.02 and the
    logits normal with a deviation of 0.1, so the update starts small, not at zero. Mergeable exactly.
    Parameters: vectors * length once, and rank * (d_in + d_out) / length * vectors logits per layer. What has to be
    kept to use it is far less: `top` indices and top - 1 weights a piece.

    Args:
        rank: inner dimension, >= 1.
        vectors: how many vectors the bank holds, >= top.
        length: size of a vector, >= 1; it has to divide d_in and d_out of every adapted layer. None takes the
            largest that does, up to 256.
        top: how many vectors are mixed, >= 1. The paper finds 2 best.

    **Cost**: that of LoRA of the same rank, and 2 * top * rank * (d_in + d_out) FLOP a layer and step to make the
    factors. While training the logits outweigh the factors they make by vectors / length.

    **Use it when** many adapters of one base have to be stored or sent.

    **Learning rate**: 1e-3 as for LoRA, with ten times that for the logits: the paper, too, trains these two at rates
    of their own (bank 1e-3, logits 1e-2). Not tuned here.
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 1e-2.

    **Differs from**: the paper's bank for each of its models has a length chosen by hand; so does PEFT's, 256.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, VBLoRA(rank=2, vectors=5, length=4)).trainable_parameters
        80

    References: Li et al. 2024, arXiv:2405.15179, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 3, "vectors": 6},
        {"rank": 2, "vectors": 5, "length": 2, "top": 3},
    )
    exceptions: ClassVar[Mapping[str, str]] = {
        "identity": "a bank of zeros would give no gradient, and one of the factors alone cannot be zero"
    }

    rank: int = 4
    """Inner dimension of the update."""
    vectors: int = 256
    """Vectors in the bank."""
    length: int | None = None
    """Numbers in a vector; None means the largest up to 256 that fits every layer."""
    top: int = 2
    """How many vectors make a piece."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + integer("vectors", self.vectors) + integer("top", self.top)
        found += [] if self.length is None else integer("length", self.length)
        if not found and self.top > self.vectors:
            found.append(f"top {self.top} exceeds the {self.vectors} vectors of the bank")
        return found

    def problems_at(self, base: Base) -> list[str]:
        if self.length is not None and (base.d_in % self.length or base.d_out % self.length):
            return [f"length {self.length} does not divide d_in {base.d_in} and d_out {base.d_out}"]
        return []

    def rate_of(self, parameter: str) -> float:
        return 10.0 if parameter.startswith("logits") else 1.0

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        length = self.length or _common_length([size for base in bases for size in (base.d_in, base.d_out)])
        return VectorBank(source.parameter(self.vectors, length, init=_small_uniform))

    def build(self, base: Base) -> VBLoRAAdapter:
        assert isinstance(base.common, VectorBank)
        length = base.common.bank.shape[1]
        return VBLoRAAdapter(
            base.parameter(self.rank, base.d_in // length, self.vectors, init=_normal),
            base.parameter(base.d_out // length, self.rank, self.vectors, init=_normal),
            top=self.top,
        )


def _common_length(sizes: Sequence[int]) -> int:
    common = math.gcd(*sizes)
    return next(length for length in range(min(256, common), 0, -1) if common % length == 0)


def _small_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-0.02, 0.02, generator=generator)


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, 0.1, generator=generator)


class VectorBank(nn.Module):
    """bank: (vectors, length)."""

    def __init__(self, bank: nn.Parameter) -> None:
        super().__init__()
        self.bank = bank


class VBLoRAAdapter(ProductAdapter):
    """logits_A: (rank, d_in / length, vectors), logits_B: (d_out / length, rank, vectors)."""

    common: VectorBank

    def __init__(self, logits_A: nn.Parameter, logits_B: nn.Parameter, *, top: int) -> None:
        super().__init__()
        self.logits_A, self.logits_B, self.top = logits_A, logits_B, top

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        rank = len(self.logits_A)
        A = self._pieces(self.logits_A).reshape(rank, -1)
        B = self._pieces(self.logits_B).transpose(1, 2).reshape(-1, rank)
        return A, B, 1.0

    def _pieces(self, logits: Tensor) -> Tensor:
        """logits: (m, n, vectors) -> (m, n, length)."""
        chosen, places = logits.topk(self.top, dim=-1)
        return (chosen.softmax(-1)[..., None] * self.common.bank[places]).sum(-2)
