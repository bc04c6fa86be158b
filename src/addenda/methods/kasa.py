"""KaSA: the weight's least singular components give way to an update in the form of a singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import number
from addenda.core.registry import register
from addenda.core.starts import jointly, wide_weight
from addenda.methods.lora import LoRAAdapter, LowRank, add_low_rank

__all__ = ["KaSA"]


@register("kasa")
@dataclass(frozen=True)
class KaSA(LowRank):
    """Low-rank update with singular values of its own, in the place of the weight's least components.

    y = base(x) - B0 (A0 x) + scaling * B (l * (A x)),   B0 A0: the components of W of the least singular values

    A: (rank, d_in),  B: (d_out, rank),  l: (rank,);  A0, B0: as A and B, frozen. A starts Kaiming-uniform, l Gaussian
    and B zero, so the layer starts as its base without those components. A penalty, summed over layers, keeps l small
    and A and B close to what singular vectors are: beta |l|^2 + gamma (|B^T B - I| + |A A^T - I|), Frobenius norms.
    Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out + 1) per layer.

    Args:
        rank: inner dimension and number of components that go, 1 <= rank < min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.
        beta: weight of the penalty on l, >= 0.
        gamma: weight of the penalty on factors that are not orthonormal, >= 0.

    **Cost**: LoRA's at twice the rank, in the forward pass and in the file; and once a decomposition of each weight,
    about 10 * d_out * d_in * min(d_out, d_in) FLOP.

    **Use it when** the base is large beside the task, so that its least components may be taken for noise.

    **Learning rate**: LoRA's default; not tuned, nor are beta and gamma, which are PEFT's defaults.

    **Differs from**: PEFT, and the paper's code, change the base's weight and cannot give it back. Here the adapter
    takes the components off what the base computes. PEFT leaves the penalty to its caller.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, KaSA(rank=2), targets=["0"]).trainable_parameters
        26

    References: Wang et al. 2024, arXiv:2412.06071.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 4}, {"rank": 3, "alpha": 5.0})
    exceptions: ClassVar[Mapping[str, str]] = {
        "identity": "the weight's least singular components are taken off from the start"
    }

    beta: float = 1e-4
    """Weight of the penalty on singular values."""
    gamma: float = 1e-3
    """Weight of the penalty on factors that are not orthonormal."""

    def problems(self) -> list[str]:
        found = super().problems() + number("beta", self.beta, least=0.0)
        return found + number("gamma", self.gamma, least=0.0)

    def problems_at(self, base: Base) -> list[str]:
        rank, limit = self.rank_at(base.path), min(base.d_in, base.d_out)
        return (
            [f"rank {rank} leaves nothing of min(d_in, d_out) = {limit} components"] if rank >= limit else []
        )

    def build(self, base: Base) -> KaSAAdapter:
        rank = self.rank_at(base.path)
        first, second = jointly(lambda _: least_components(wide_weight(base), rank), 2)
        taken_off = base.constant(rank, base.d_in, init=first), base.constant(base.d_out, rank, init=second)
        adapter = KaSAAdapter(
            *self.pair_for(base), self.scaling_at(base.path), dropout=self.dropout, taken_off=taken_off
        )
        adapter.values = base.parameter(rank, init=lambda t, generator: t.normal_(generator=generator))
        return adapter

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        if not adapters or not (self.beta or self.gamma):
            return None
        return torch.stack([self._penalty(cast(KaSAAdapter, adapter)) for adapter in adapters.values()]).sum()

    def _penalty(self, adapter: KaSAAdapter) -> Tensor:
        one = torch.eye(len(adapter.A), dtype=adapter.A.dtype, device=adapter.A.device)
        grams = adapter.B.t() @ adapter.B, adapter.A @ adapter.A.t()
        far = torch.stack([torch.linalg.matrix_norm(gram - one) for gram in grams]).sum()
        return self.beta * adapter.values.square().sum() + self.gamma * far


def least_components(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A0 (rank, d_in) and B0 (d_out, rank): their product is what the least singular values add to a weight."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return S[-rank:, None] * Vh[-rank:], U[:, -rank:]


class KaSAAdapter(LoRAAdapter):
    """A: (rank, d_in), values: (rank,), B: (d_out, rank); A0, B0: as A and B, frozen, of the components taken off."""

    values: nn.Parameter
    A0: Tensor
    B0: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        A = torch.cat([self.values[:, None] * self.A, self.A0])
        return A, torch.cat([self.B, self.B0 / -self.scaling], dim=1)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not (self.training and self.dropout):
            return super().forward(x, base)
        y = add_low_rank(x, base, self.values[:, None] * self.A, self.B, self.scaling, dropout=self.dropout)
        return y - base.low_rank(x, self.A0.to(base.dtype), self.B0.to(base.dtype))
