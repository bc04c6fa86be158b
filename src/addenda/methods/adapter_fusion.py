"""AdapterFusion: attention over what several frozen adapters change, learned for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base
from addenda.core.mixing import Mixture, MixtureAdapter
from addenda.core.ranges import integer, number
from addenda.core.registry import register

__all__ = ["AdapterFusion"]


@register("adapter-fusion")
@dataclass(frozen=True)
class AdapterFusion(Mixture):
    """Mix frozen adapters by attention: each token asks, at each layer, which of them it needs.

    h = base(x),   D_n = adapter_n(x) - h,   s = softmax over n of (Q h) . (K D_n),   y = h + sum_n s_n V D_n

    Q, K: (size, d),  V: (d, d),  d the layer's output features. Q and K are drawn (Kaiming-uniform), V is the identity
    with N(0, 1e-6) beside its diagonal: it starts near the mean of the adapters, and not at the base. The adapters are
    frozen and do not run by themselves as long as the mixture is attached. Not mergeable: the shares differ from token
    to token. Parameters: 2 * size * d + d * d per layer; 3 * d * d where size is 0.

    Args:
        of: names of the adapters, which are on the model already; at least two. All of them have to stand on each of
            the targets, which are by default the layers on which any does.
        size: width in which queries and keys meet, >= 0; 0 for d, the paper's.
        identity_penalty: weight of ||V - I||^2 in the loss, >= 0; it holds the values to what the adapters learned.

    **Cost**: the adapters themselves, and (n + 1) * size * d + d * d multiplications for a token.

    **Use it when** adapters for several tasks exist and a new task, or one of theirs, may profit from all of them.

    **Learning rate**: 5e-5, with which AdapterHub's example trains fusion; not tuned here.

    Differs from: the paper's adapters are bottlenecks and fusion stands once a block, behind the feed-forward; here it
    stands wherever the adapters do, and mixes any adapters by what they change. AdapterHub's queries and keys have
    biases; a key's is the same for all adapters and leaves their shares as they are, so there are none here.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> for name in ("law", "style"):
        ...     _ = addenda.attach(model, addenda.Bottleneck(size=2), targets=["0"], name=name)
        >>> addenda.attach(model, AdapterFusion(of=("law", "style")), name="mix").trainable_parameters
        48

    References: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv", "embedding", "block")
    learning_rate: ClassVar[float] = 5e-5
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"of": ["law", "style"]},
        {"of": ["law", "style"], "size": 8, "identity_penalty": 0.0},
    )
    exceptions: ClassVar[Mapping[str, str]] = {"identity": "it starts as the mean of the adapters it mixes"}

    size: int = 0
    """Width in which queries and keys meet; 0 for the layer's own."""
    identity_penalty: float = 0.01
    """Weight of the values' distance from the identity."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("size", self.size, least=0)
        if len(self.of) == 1:
            found.append("of names one adapter, which leaves nothing to choose from")
        return found + number("identity_penalty", self.identity_penalty, least=0.0)

    def build(self, base: Base) -> AdapterFusionAdapter:
        d = base.channels_out
        size = self.size or d
        return AdapterFusionAdapter(
            self,
            base,
            Q=base.parameter(size, d, init=_kaiming_uniform),
            K=base.parameter(size, d, init=_kaiming_uniform),
            V=base.parameter(d, d, init=_near_identity),
        )

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        if not self.identity_penalty:
            return None
        values = [a.V for a in adapters.values() if isinstance(a, AdapterFusionAdapter)]
        away = [(V - torch.eye(len(V), dtype=V.dtype, device=V.device)).square().sum() for V in values]
        return self.identity_penalty * torch.stack(away).sum()


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _near_identity(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(tensor, std=1e-6, generator=generator).fill_diagonal_(1.0)


class AdapterFusionAdapter(MixtureAdapter):
    """Q, K: (size, d), V: (d, d)."""

    def __init__(
        self, method: AdapterFusion, base: Base, *, Q: nn.Parameter, K: nn.Parameter, V: nn.Parameter
    ) -> None:
        super().__init__(method.of, base)
        self.Q, self.K, self.V = Q, K, V

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h, changes = self.changes(x, base)
        changed = torch.stack([base.outputs_last(each) for each in changes], dim=-2)
        asked = F.linear(base.outputs_last(h), self.Q.to(h.dtype))
        keys = F.linear(changed, self.K.to(h.dtype))
        shares = (keys * asked[..., None, :]).sum(-1, keepdim=True).softmax(dim=-2)
        mixed = (shares * changed).sum(dim=-2)  # the shares add up to 1 before V as well as behind it
        return h + base.outputs_back(F.linear(mixed, self.V.to(h.dtype)))
