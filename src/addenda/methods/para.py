"""PaRa: take a subspace out of the weight, and put nothing in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from addenda.core.contract import Base, Method
from addenda.core.ranges import integer, one_of
from addenda.core.registry import register
from addenda.methods.deft import PROJECTIONS, DEFTAdapter, small_normal

__all__ = ["PaRa"]


@register("para")
@dataclass(frozen=True)
class PaRa(Method):
    """Parameter rank reduction: remove what the weight writes into a learned subspace.

    y = base(x) - Q S^T W x,   P, Q, S: (d_out, rank)

    orthogonal:  Q = S = an orthonormal basis of P's columns (QR), so that Q S^T is a projection
    relu:        Q = P, S = relu(P)

    P is trained; it starts normal with a deviation of 0.02. Mergeable exactly into an unquantized weight. Parameters:
    rank * d_out per layer, half of LoRA's and less.

    Args:
        rank: dimensions of the subspace, 1 <= rank <= min(d_in, d_out).
        projection: ``orthogonal`` or ``relu``.

    **Cost**: LoRA's, and S^T W in each forward: 2 * rank * d_in * d_out FLOP, for which a packed weight is unpacked.
    **Use it when** a generative model should keep to one subject or style: what it can make is narrowed.

    **Learning rate**: 1e-4, the rate under which PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B)
    runs it.

    **Differs from**: PEFT has it as an option of DEFT, by default with relu; the paper's is the orthogonal one.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, PaRa(rank=2), targets=["0"]).trainable_parameters
        8

    References: Chen et al. 2024, arXiv:2406.05641.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 3}, {"rank": 5, "projection": "relu"})
    exceptions: ClassVar[Mapping[str, str]] = {
        "identity": "a subspace, whichever it is, is taken out of the weight from the start"
    }

    rank: int = 8
    """Dimensions of the subspace."""
    projection: str = "orthogonal"
    """orthogonal or relu."""

    def problems(self) -> list[str]:
        return integer("rank", self.rank) + one_of("projection", self.projection, PROJECTIONS)

    def problems_at(self, base: Base) -> list[str]:
        rank, limit = self.rank, min(base.d_in, base.d_out)
        return [f"rank {rank} exceeds min(d_in, d_out) = {limit}"] if rank > limit else []

    def build(self, base: Base) -> DEFTAdapter:
        P = base.parameter(base.d_out, self.rank, init=small_normal)
        return DEFTAdapter(P, None, projection=self.projection)
