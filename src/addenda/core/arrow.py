"""Arrow: each token is sent to the low-rank adapters whose updates react to it most; nothing is trained for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from addenda.core.composition import Composition, require_names
from addenda.core.contract import Adapter, Base
from addenda.core.ranges import integer, number
from addenda.errors import ConfigError, MethodError

__all__ = ["Arrow", "prototype"]


@dataclass(frozen=True)
class Arrow(Composition):
    """Route each token at each layer to the low-rank adapters that react to it most.

    y = base(x) + sum_n c_n scaling_n B_n A_n x,   c = softmax over the top_k largest |v_n . x| / temperature

    v_n: (d_in,), the unit vector that B_n A_n lengthens most: its first right singular vector, found from the factors
    without forming their product, and kept until they change. Any adapter that is a low-rank term can be routed to.

    Args:
        of: names of the adapters that tokens are sent to.
        top_k: to how many a token is sent, >= 1; all where there are fewer.
        temperature: of the softmax, > 0; the smaller, the more the first one gets.
        general: names of adapters of general knowledge, whose mean factors are taken off those of each in ``of``
            before anything else (GenKnowSub); all then have the same rank.

    Example:
        >>> import addenda, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> for name in ("law", "style"):
        ...     _ = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name=name)
        >>> addenda.activate(model, Arrow(("law", "style"), top_k=1))
        >>> model(torch.randn(3, 8)).shape
        torch.Size([3, 4])

    References: Ostapenko et al. 2024, arXiv:2405.11157, section 3.2.
    """

    of: tuple[str, ...]
    top_k: int = 3
    temperature: float = 1.0
    general: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_names((*self.of, *self.general))
        found = integer("top_k", self.top_k) + number("temperature", self.temperature, above=0.0)
        if found:
            raise ConfigError("; ".join(found), hint="see addenda.Arrow")

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.of, *self.general)

    def without(self, name: str) -> Arrow:
        of, general = (tuple(n for n in names if n != name) for names in (self.of, self.general))
        return Arrow(of, self.top_k, self.temperature, general)

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        experts = {name: _factors(name, adapters[name], base) for name in self.of if name in adapters}
        if not experts:
            return base(x)
        general = [_factors(name, adapters[name], base) for name in self.general if name in adapters]
        by = [adapters[name] for name in self.general if name in adapters]
        tuned = {name: _without_mean(name, factors, general, base) for name, factors in experts.items()}
        kept = [_prototype_of(adapters[name], by, *tuned[name][:2]) for name in tuned]
        # One thin product gives the reaction of every prototype and the inner values of every adapter.
        thin = torch.cat([torch.stack(kept), *(A.float() for A, _, _ in tuned.values())])
        thin = thin.to(torch.promote_types(base.dtype, torch.float32))
        unit = torch.eye(len(thin), dtype=thin.dtype, device=thin.device)
        read = x.to(thin.dtype) if x.is_floating_point() else x
        inner = base.outputs_last(base.low_rank(read, thin, unit))
        shares = self._shares(inner[..., : len(kept)].abs())
        ranks = torch.tensor([len(A) for A, _, _ in tuned.values()], device=thin.device)
        gated = inner[..., len(kept) :] * shares.repeat_interleave(
            ranks, -1, output_size=len(thin) - len(kept)
        )
        B = torch.cat([B.to(thin.dtype) * scaling for _, B, scaling in tuned.values()], dim=1)
        return base(x) + base.outputs_back(F.linear(gated, B)).to(base.dtype)

    def _shares(self, reactions: Tensor) -> Tensor:
        """Return each adapter's share of a token, (..., adapters), from how strongly each reacts to it."""
        top = reactions.topk(min(self.top_k, reactions.shape[-1]), dim=-1)
        shares = (top.values / self.temperature).softmax(dim=-1)
        return torch.zeros_like(reactions).scatter(-1, top.indices, shares)

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        if not any(name in adapters for name in self.of):
            return weight, bias
        raise MethodError(
            "tokens cannot be routed to adapters on a weight that is read and not called",
            hint="route adapters on layers that are called, or activate a stack",
        )


def _factors(name: str, adapter: Adapter, base: Base) -> tuple[Tensor, Tensor, float]:
    term = adapter.low_rank_term()
    if term is None or base.groups > 1:
        why = "is no low-rank term alone" if term is None else "stands on a convolution in groups"
        raise MethodError(
            f"Arrow cannot route to '{name}', which {why} at '{base.path}'",
            hint="route to adapters such as LoRA's; dropout in training mode makes them more than a low-rank term",
        )
    return term


def _without_mean(
    name: str,
    factors: tuple[Tensor, Tensor, float],
    general: list[tuple[Tensor, Tensor, float]],
    base: Base,
) -> tuple[Tensor, Tensor, float]:
    """Take the mean of the general adapters' factors off an adapter's own."""
    if not general:
        return factors
    A, B, scaling = factors
    if any(other.shape != A.shape for other, _, _ in general):
        raise MethodError(
            f"'{name}' and the general adapters differ in rank at '{base.path}'",
            hint="general knowledge is taken off factor by factor: give all adapters the same rank",
        )
    mean_A = torch.stack([other for other, _, _ in general]).mean(0)
    mean_B = torch.stack([other for _, other, _ in general]).mean(0)
    return A - mean_A, B - mean_B, scaling


_Stamp = tuple[tuple[int, int], ...]
_PROTOTYPES: WeakKeyDictionary[Adapter, tuple[_Stamp, Tensor]] = WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _prototype_of(adapter: Adapter, general: list[Adapter], A: Tensor, B: Tensor) -> Tensor:
    """Return an adapter's prototype, (d_in,) float32; found anew where a tensor that it comes from has changed."""
    tensors = [t for each in (adapter, *general) for t in each.state_dict(keep_vars=True).values()]
    stamp = tuple((id(t), t._version) for t in tensors) if not any(t.is_inference() for t in tensors) else ()
    known = _PROTOTYPES.get(adapter)
    if known is None or not stamp or known[0] != stamp or known[1].device != A.device:
        known = _PROTOTYPES[adapter] = (stamp, prototype(A, B))
    return known[1]


def prototype(A: Tensor, B: Tensor) -> Tensor:
    """Return the first right singular vector of B A, without forming it; its sign is arbitrary.

    Args:
        A: ``(rank, d_in)``.
        B: ``(d_out, rank)``.

    Returns:
        ``(d_in,)`` of length 1, float32.

    Example:
        >>> prototype(torch.tensor([[3.0, 4.0]]), torch.ones(5, 1)).abs()
        tensor([0.6000, 0.8000])
    """
    with torch.no_grad():
        across, inner = torch.linalg.qr(A.double().t())  # B A = B inner^T across^T
        _, outer = torch.linalg.qr(B.double())
        _, _, turned = torch.linalg.svd(outer @ inner.t())
        found: Tensor = (across @ turned[0]).float()
        return found
