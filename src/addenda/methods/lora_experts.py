"""Experts of LoRA: several low-rank updates on a layer, and a router that mixes them for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.balance import counted, imbalance, shapes
from addenda.core.contract import Adapter, Base
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import flag, integer, number
from addenda.core.registry import register
from addenda.methods.lora import LowRank

__all__ = ["LoRAExperts"]


@register("lora-experts")
@dataclass(frozen=True)
class LoRAExperts(LowRank):
    """Several low-rank updates on each layer, mixed for each token by a router: the experts of LoRA.

    y = base(x) + scaling * sum over e of g_e B_e A_e x,   p = softmax(R x),   g = p of the chosen / their sum

    A_e: (rank, d_in),  B_e: (d_out, rank), e = 1 .. experts,  R: (experts, d_in),  p, g: (experts,) for each token. The
    `top_k` experts of the largest p are chosen, the others get 0; without ``renormalized`` the chosen keep p itself.
    A and R start Kaiming-uniform and B zero, so the adapted layer starts equal to its base. Not mergeable: the mixture
    depends on the token. Where not all experts are chosen, a penalty draws the router towards using them evenly:

    balance * experts * sum over e of f_e m_e,   f_e = share of the choices that fell on e,   m_e = mean of p_e

    over the tokens of a whole step and summed over layers. Three settings are methods by name: all experts chosen is
    MoLoRA, and the router of LoRAMoE; a part of them MixLoRA's router; all chosen and ``shared_a`` HydraLoRA.
    Parameters: experts * (rank * (d_in + d_out) + d_in) per layer, (experts - 1) * rank * d_in fewer with a shared A.

    Args:
        rank: inner dimension of one expert, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank, that is a scaling of 2.
        dropout: probability of zeroing an input feature of A during training, in [0, 1); the router sees all.
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.
        experts: how many there are on each layer, >= 2.
        top_k: how many of them a token is given to, 1 <= top_k <= experts; None means all.
        renormalized: let the gates of a token add up to 1, whatever the p of those that were not chosen. With one
            expert chosen it has to be off: a gate that is always 1 teaches the router nothing.
        shared_a: one A for all experts of a layer.
        balance: weight of the penalty, >= 0.

    **Cost**: that of LoRA of experts * rank: all experts run for all tokens, as dense thin products are faster than
    gathering the tokens of each. 2 * experts * d_in FLOP a token for the router, and in the backward half of
    (experts - 1) times that for the penalty. Forward and backward of layers of 896 x 896 to 4864 x 896 in float32 took
    8 to 13 % longer than LoRA of the same rank on one core, 15 to 25 % with the penalty.

    **Use it when** the data are a mixture of tasks that get into each other's way in one adapter.

    **Learning rate**: 1e-3, as for LoRA. Not tuned, nor is ``balance``, which is Switch Transformer's 0.01.

    **Differs from**: MixLoRA routes once for each feed-forward block and balances each micro-batch by itself; here
    each layer has its router, and the balance is that of the whole step, however it is cut. The penalty's gradient
    stops at the router, and tokens on which the loss does not depend, such as padding, do not count. LoRAMoE's
    constraint, which has to know each sample's kind of task, is not here.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, LoRAExperts(rank=2, experts=3, top_k=2), targets=["0"]).trainable_parameters
        96

    References: Zadouri et al. 2023, arXiv:2309.05444 (MoLoRA). Li et al. 2024, arXiv:2404.15159 (MixLoRA). Tian et al.
    2024, arXiv:2404.19245 (HydraLoRA). Dou et al. 2023, arXiv:2312.09979 (LoRAMoE). Fedus et al. 2021,
    arXiv:2101.03961, section 2.2 (the penalty).
    """

    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4, "top_k": 2},
        {"rank": 3, "experts": 3, "shared_a": True, "alpha": 3.0},
        {"rank": 2, "experts": 2, "top_k": 1, "renormalized": False},
    )

    rank: int = 8
    """Inner dimension of one expert."""
    experts: int = 4
    """How many experts each layer has."""
    top_k: int | None = None
    """How many of them a token is given to; None means all."""
    renormalized: bool = True
    """Let the gates of a token add up to 1."""
    shared_a: bool = False
    """One A for all experts of a layer."""
    balance: float = 0.01
    """Weight of the penalty on experts that are used unevenly."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("experts", self.experts, least=2)
        found += flag("renormalized", self.renormalized) + flag("shared_a", self.shared_a)
        found += number("balance", self.balance, least=0.0)
        if self.top_k is not None:
            found += integer("top_k", self.top_k)
        if found:
            return found
        if self.chosen > self.experts:
            return [f"top_k {self.chosen} exceeds experts {self.experts}"]
        if self.chosen == 1 and self.renormalized:
            return ["top_k 1 trains no router while renormalized: set renormalized to False"]
        return []

    @property
    def chosen(self) -> int:
        """How many experts a token is given to."""
        return self.experts if self.top_k is None else self.top_k

    def build(self, base: Base) -> LoRAExpertsAdapter:
        rank, own = self.rank_at(base.path), 1 if self.shared_a else self.experts
        adapter = LoRAExpertsAdapter(
            base.parameter(own, rank, base.d_in, init=_each_kaiming_uniform),
            base.parameter(self.experts, base.d_out, rank),
            base.parameter(self.experts, base.d_in, init=kaiming_uniform),
            self,
            scaling=self.scaling_at(base.path),
        )
        if self.chosen < self.experts and self.balance:
            adapter.sums = ("load", "overlap")
            for name, shape in zip(adapter.sums, shapes(self.experts, base.d_in), strict=True):
                adapter.register_buffer(name, base.constant(*shape), persistent=False)
        return adapter

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        ours = [cast(LoRAExpertsAdapter, adapter) for adapter in adapters.values()]
        uneven = [imbalance(a.router, a.load, a.overlap) for a in ours if a.sums and a.load.any()]
        return self.balance * torch.stack(uneven).sum() if uneven else None


def _each_kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    kaiming_uniform(tensor.flatten(0, 1), generator)


class LoRAExpertsAdapter(Adapter):
    """A: (experts or 1, rank, d_in), B: (experts, d_out, rank), router: (experts, d_in).

    load, overlap: what a step's passes sum up about the use of the experts, as `addenda.core.balance` says.
    """

    additive = True
    load: Tensor
    overlap: Tensor

    def __init__(
        self, A: nn.Parameter, B: nn.Parameter, router: nn.Parameter, settings: LoRAExperts, *, scaling: float
    ) -> None:
        super().__init__()
        self.A, self.B, self.router = A, B, router
        self.top_k, self.renormalized = settings.chosen, settings.renormalized
        self.dropout, self.scaling = settings.dropout, scaling

    def gates(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gates (..., experts) for the router's p, and which experts are chosen, or None where all are."""
        if self.top_k == len(self.router):
            return p, None
        chosen = torch.zeros_like(p).scatter(-1, p.topk(self.top_k).indices, 1.0)
        gates = p * chosen
        return gates / gates.sum(-1, keepdim=True) if self.renormalized else gates, chosen

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B, router = (tensor.to(base.dtype) for tensor in (self.A, self.B, self.router))
        p = F.linear(x, router).softmax(-1, dtype=torch.promote_types(base.dtype, torch.float32))
        gates, chosen = self.gates(p)
        inner = F.linear(F.dropout(x, self.dropout, self.training), A.flatten(0, 1))
        inner = inner.view(*x.shape[:-1], *A.shape[:2]) * (self.scaling * gates).to(base.dtype).unsqueeze(-1)
        y = base(x) + F.linear(inner.flatten(-2), B.transpose(0, 1).flatten(1))
        if chosen is None or not (self.sums and self.training and torch.is_grad_enabled()):
            return y
        return counted(y, x, p, chosen, (self.load, self.overlap))
