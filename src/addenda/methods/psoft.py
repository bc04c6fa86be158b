"""PSOFT: orthogonal fine-tuning within the principal subspace of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base, Method
from addenda.core.decomposition import leading_svd
from addenda.core.products import ProductAdapter
from addenda.core.ranges import flag, integer, number
from addenda.core.registry import register
from addenda.core.rotation import cayley, cayley_neumann, skew
from addenda.core.starts import jointly

__all__ = ["PSOFT"]


@register("psoft")
@dataclass(frozen=True)
class PSOFT(Method):
    """Rotate the layer's input within the directions in which its weight is largest.

    y = base(x) + B (diag(b) R diag(a) - I) A x,   R = (I + Q) (I - Q)^-1,   Q = -Q^T: (rank, rank)

    W is close to B A, its singular value decomposition U S V^T cut after ``rank`` values: A = V^T: (rank, d_in),
    B = U S: (d_out, rank). Both are frozen and kept with the adapter. The entries of Q above the diagonal start at
    zero, the vectors a and b at one, so the adapted layer starts equal to its base. Mergeable exactly into an
    unquantized weight. Parameters: rank * (rank - 1) / 2 + 2 * rank per layer.

    Args:
        rank: dimensions of the subspace, 2 <= rank <= min(d_in, d_out).
        scale_input: train a, which relaxes orthogonality.
        scale_output: train b, likewise.
        orthogonal: keep R orthogonal; otherwise R is trained freely, from I.
        exact: solve for R; otherwise its inverse is a series, orthogonal only while Q is small.
        terms: terms of the series, >= 2, used where not exact.
        bound: largest Frobenius norm of Q in the series, > 0 and < 1. None means no limit.
        symmetric: A = sqrt(S) V^T and B = U sqrt(S) instead, with which R is no longer a rotation of the weight.
        iterations: power iterations of a randomized decomposition, >= 0. None decomposes exactly, which takes
            min(d_in, d_out)^2 * max(d_in, d_out) operations at the start.
        seed: what the randomized decomposition draws from, >= 0.

    **Cost:** per token as LoRA of the same rank, fused like it, and a product of d_out * rank^2 a step; A and B take
    the memory of LoRA's, without gradients or optimizer state.

    **Use it when** OFT's geometry is wanted at LoRA's speed, with a file that does not grow with the layers' width.

    **Learning rate:** 1e-4, that of PEFT's published comparison on MetaMathQA (Llama 3.2 3B, rank 256); not tuned here.

    Differs from: PEFT has an alpha, which divides B and multiplies the product again: it changes nothing and is left
    out. PEFT decomposes the base anew when an adapter is loaded, here A and B are saved, because the signs of singular
    vectors may differ from machine to machine.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, PSOFT(rank=3), targets=["0"]).trainable_parameters
        9

    References: Wu et al. 2025, arXiv:2505.11235.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 6},
        {"rank": 4, "orthogonal": False, "scale_input": False, "symmetric": True},
        {"rank": 5, "exact": False, "terms": 6, "bound": 0.9, "scale_output": False, "iterations": 4},
    )

    rank: int = 64
    """Dimensions of the subspace."""
    scale_input: bool = True
    """Train a factor for each direction before the rotation."""
    scale_output: bool = True
    """Train a factor for each direction behind the rotation."""
    orthogonal: bool = True
    """Keep the rotation orthogonal."""
    exact: bool = True
    """Solve for the rotation instead of taking a series."""
    terms: int = 5
    """Terms of the series."""
    bound: float | None = None
    """Largest norm of Q in the series."""
    symmetric: bool = False
    """Share the singular values between A and B."""
    iterations: int | None = None
    """Power iterations of a randomized decomposition; None decomposes exactly."""
    seed: int = 0
    """What the randomized decomposition draws from."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank, least=2) + integer("terms", self.terms, least=2)
        found += integer("seed", self.seed, least=0)
        for name in ("scale_input", "scale_output", "orthogonal", "exact", "symmetric"):
            found += flag(name, getattr(self, name))
        if self.bound is not None:
            found += number("bound", self.bound, above=0.0, below=1.0)
        return found if self.iterations is None else found + integer("iterations", self.iterations, least=0)

    def problems_at(self, base: Base) -> list[str]:
        limit = min(base.d_in, base.d_out)
        return [f"rank {self.rank} exceeds min(d_in, d_out) = {limit}"] if self.rank > limit else []

    def build(self, base: Base) -> PSOFTAdapter:
        first, second = jointly(lambda _: self.subspace(base.weight()), 2)
        core = base.parameter(self.rank * (self.rank - 1) // 2) if self.orthogonal else None
        if core is None:
            core = base.parameter(self.rank, self.rank, init=lambda R, _: nn.init.eye_(R))
        return PSOFTAdapter(
            core,
            a=base.parameter(self.rank, init=1.0) if self.scale_input else None,
            b=base.parameter(self.rank, init=1.0) if self.scale_output else None,
            A=base.constant(self.rank, base.d_in, init=first),
            B=base.constant(base.d_out, self.rank, init=second),
            settings=self,
        )

    def subspace(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return A: (rank, d_in) and B: (d_out, rank) of a weight: (d_out, d_in)."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.iterations is None:
            U, S, Vt = leading_svd(wide, self.rank)
        else:
            with torch.random.fork_rng(devices=[wide.device] if wide.is_cuda else []):
                torch.manual_seed(self.seed)
                U, S, V = torch.svd_lowrank(wide, q=self.rank, niter=self.iterations)
            Vt = V.t()
        if self.symmetric:
            return S.sqrt()[:, None] * Vt, U * S.sqrt()
        return Vt, U * S


class PSOFTAdapter(ProductAdapter):
    """core: above the diagonal of Q, (rank * (rank - 1) / 2,), or R: (rank, rank); a, b: (rank,); A, B frozen."""

    core: nn.Parameter
    a: nn.Parameter | None
    b: nn.Parameter | None
    A: Tensor
    B: Tensor

    def __init__(
        self,
        core: nn.Parameter,
        *,
        a: nn.Parameter | None,
        b: nn.Parameter | None,
        A: Tensor,
        B: Tensor,
        settings: PSOFT,
    ) -> None:
        super().__init__()
        self.hold(core=core, a=a, b=b, A=A, B=B)
        self.settings = settings

    def rotation(self) -> Tensor:
        """Return R: (rank, rank)."""
        if not self.settings.orthogonal:
            return self.core
        Q = skew(self.core, self.settings.rank)
        if self.settings.exact:
            return cayley(Q)
        if self.settings.bound is not None:
            Q = Q * (self.settings.bound / Q.detach().norm()).clamp(max=1.0)
        return cayley_neumann(Q, self.settings.terms)

    def low_rank_term(self) -> tuple[Tensor, Tensor, float]:
        R = self.rotation()
        R = R if self.b is None else self.b[:, None] * R
        R = R if self.a is None else R * self.a
        return self.A, self.B @ (R - torch.eye(len(R), dtype=R.dtype, device=R.device)), 1.0
