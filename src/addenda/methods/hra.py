"""HRA: Householder reflection adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import flag, integer, number
from addenda.core.registry import register
from addenda.core.rotation import FeatureMap, mapped_size

__all__ = ["HRA"]


@register("hra")
@dataclass(frozen=True)
class HRA(Method):
    """Reflect the layer's input at a few trained hyperplanes, one after the other.

    y = base(x H^T),   H = H_1 ... H_r,   H_i = I - 2 u_i u_i^T / |u_i|^2: (d_in, d_in)

    The vectors start Kaiming-uniform and in equal pairs, whose reflections undo each other, so the adapted layer starts
    equal to its base. At an embedding the output is reflected. Mergeable exactly: the weight becomes W H.
    Parameters: r * d_in per layer.

    Args:
        rank: r, number of reflections, >= 1 and even; an odd one starts at a reflection, not at the base.
        orthonormal: make the vectors orthonormal first, so that H = I - 2 U^T U with U: (r, d_in). It starts at that,
            not at the base.
        regularization: factor of |U U^T - I|^2 for the normalized vectors, summed over the layers and added to the
            loss, >= 0. It leads from free reflections towards orthonormal ones.

    **Cost:** 2 * r * d_in multiplications per token beside LoRA's r * (d_in + d_out), by one product of r columns and
    one back, however many reflections; it keeps r numbers per token, as LoRA does.

    **Use it when** a rotation shall reach across all features with the parameters of LoRA's A alone.

    **Learning rate:** 1e-3; not tuned. PEFT's published comparison on MetaMathQA (rank 32) took 1e-4, the rate it gave
    to every method without one of its own.

    Differs from: the paper and PEFT multiply r matrices; here they are one matrix I - V T V^T (the compact form of a
    product of reflections), applied to activations. Where PEFT orthogonalizes by Gram-Schmidt, this takes a QR
    decomposition; only the plane that the vectors span counts. PEFT starts those in equal pairs too, of which
    orthonormal ones cannot be made; here they start independent.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, HRA(rank=2), targets=["0"]).trainable_parameters
        16

    References: Yuan et al. 2024, arXiv:2405.17484, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 2}, {"rank": 6, "regularization": 0.1})

    rank: int = 8
    """Number of reflections."""
    orthonormal: bool = False
    """Make the vectors orthonormal first."""
    regularization: float = 0.0
    """Factor of the vectors' distance from orthonormal ones in the loss."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + flag("orthonormal", self.orthonormal)
        return found + number("regularization", self.regularization, least=0.0)

    def problems_at(self, base: Base) -> list[str]:
        size = mapped_size(base)
        return [f"rank {self.rank} exceeds its {size} features"] if self.rank > size else []

    def build(self, base: Base) -> HRAAdapter:
        start = _uniform if self.orthonormal or self.rank % 2 else _in_pairs
        return HRAAdapter(
            base.parameter(self.rank, mapped_size(base), init=start), base, orthonormal=self.orthonormal
        )

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        if not self.regularization:
            return None
        terms = [cast(HRAAdapter, adapter).skewness() for adapter in adapters.values()]
        return self.regularization * torch.stack(terms).sum()


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-1, 1, generator=generator).mul_(math.sqrt(2 / len(tensor)))


def _in_pairs(tensor: Tensor, generator: torch.Generator) -> None:
    _uniform(tensor[::2], generator)
    tensor[1::2] = tensor[::2]


class HRAAdapter(FeatureMap):
    """vectors: (rank, d_in), not normalized."""

    def __init__(self, vectors: nn.Parameter, base: Base, *, orthonormal: bool) -> None:
        super().__init__(base)
        self.vectors, self.orthonormal = vectors, orthonormal

    def skewness(self) -> Tensor:
        """Return |U U^T - I|^2, a scalar, of the normalized vectors U."""
        U = F.normalize(self.vectors, dim=1)
        eye = torch.eye(len(U), dtype=U.dtype, device=U.device)
        return (U @ U.t() - eye).square().sum()

    def compact(self) -> tuple[Tensor, Tensor]:
        """Return V: (d_in, rank) and T: (rank, rank) with H = I - V T V^T, in float64.

        Equal vectors make terms that cancel; in float32 the start would be visibly off the base.
        """
        vectors = self.vectors.double()
        eye = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
        if self.orthonormal:
            return torch.linalg.qr(vectors.t())[0], 2 * eye
        U = F.normalize(vectors, dim=1)
        inverse = torch.triu(U @ U.t(), 1) + eye / 2
        return U.t(), torch.linalg.solve_triangular(inverse, eye, upper=True)

    def map(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        V, T = self.compact()
        back = (T if transposed else T.t()) @ V.t()
        return x - (x @ V.to(x.dtype)) @ back.to(x.dtype)
