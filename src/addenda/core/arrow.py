"""Arrow: low-rank adapters mixed for each token by how far it lies in the direction to which each responds most."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from addenda.core.composition import Composition, Stack, require_names
from addenda.core.contract import Adapter, Base
from addenda.core.gated import Factors, add_gated
from addenda.core.ranges import integer, number
from addenda.errors import ConfigError, MethodError, TargetError

__all__ = ["Arrow", "leading_right_vector"]


@dataclass(frozen=True)
class Arrow(Composition):
    """A mixture of low-rank adapters for each token and layer, by a router that is computed and not trained.

    y = base(x) + sum over i of g_i scaling_i B_i A_i x,   s_i = |v_i . x|,   g = softmax of the chosen s / temperature

    v_i: (d_in,), the prototype of an adapter on a layer, is the direction of unit length to which it responds most, the
    right singular vector of B_i A_i with the largest singular value. The `top_k` adapters of the largest s_i are chosen
    for a token; the others get 0. Prototypes are computed from the factors alone when a layer first runs, and anew when
    an adapter's values change.

    With ``general`` adapters each of the others counts by what it has beyond their mean (GenKnowSub, as PEFT computes
    it): A_i less the mean of their A, and B_i less the mean of their B, in prototypes and terms.

    Args:
        of: the adapters by name, at least one; each of them low-rank.
        top_k: how many of them a token is given to, >= 1; all, where a layer has fewer.
        temperature: of the softmax, dimensionless, > 0; lower is nearer to the best one alone.
        general: adapters of general knowledge by name, of the same rank as the others on each layer; they do not run.

    **Cost**: that of one LoRA of the sum of the ranks, and 2 * adapters * d_in FLOP a token and layer for the router.
    **Use it when** adapters were trained apart on tasks of their own, and inputs do not say of which task they are.
    **Differs from**: PEFT finds the prototypes by 15 steps
    of a power iteration from a random vector, which may end short of them; here they are exact. PEFT asks for equal
    ranks and layers; here a layer mixes those that it has. PEFT writes the subtraction into the adapters for good;
    here they stay as they are.

    Example:
        >>> Arrow(("law", "style"), top_k=1).names
        ('law', 'style')

    References: Ostapenko et al. 2024, arXiv:2405.11157, section 3.2. Bagherifard et al. 2025, arXiv:2505.10939
    (GenKnowSub).
    """

    of: tuple[str, ...]
    top_k: int = 3
    temperature: float = 1.0
    general: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_names(self.names)
        found = [] if self.of else ["no adapter is named"]
        found += integer("top_k", self.top_k) + number("temperature", self.temperature, above=0.0)
        if found:
            raise ConfigError("; ".join(found), hint="see help(addenda.Arrow)")

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.of, *self.general)

    def without(self, name: str) -> Composition:
        of, general = (tuple(n for n in names if n != name) for names in (self.of, self.general))
        return Arrow(of, self.top_k, self.temperature, general) if of else Stack()

    def fold(
        self, weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Adapter]
    ) -> tuple[Tensor, Tensor | None]:
        raise MethodError(
            "each token has a mixture of its own under Arrow, which no weight gives",
            hint="use it on layers that are called, and leave out those whose weight is only read",
        )

    def run(self, x: Tensor, base: Base, adapters: Mapping[str, Adapter]) -> Tensor:
        present = {name: adapters[name] for name in self.of if name in adapters}
        if not present:
            return base(x)
        if not base.pointwise:
            raise TargetError(
                f"tokens cannot be routed at '{base.path}' ({base.kind}): its input does not hold their features",
                hint="attach the adapters to linear layers alone",
            )
        general = [self._term(name, adapters, base) for name in self.general if name in adapters]
        terms = [_less(self._term(name, adapters, base), general, name, base) for name in present]
        prototypes = self._prototypes(tuple(present.values()), terms, [*present, *self.general], adapters)
        return add_gated(x, base, terms, self.gates(x, prototypes))

    def gates(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """Return each adapter's share, (..., adapters), of tokens (..., d_in), given prototypes (adapters, d_in)."""
        nearness = (x.to(prototypes.dtype) @ prototypes.t()).abs()
        values, chosen = nearness.topk(min(self.top_k, nearness.shape[-1]), dim=-1)
        return torch.zeros_like(nearness).scatter(-1, chosen, (values / self.temperature).softmax(-1))

    @staticmethod
    def _term(name: str, adapters: Mapping[str, Adapter], base: Base) -> Factors:
        term = adapters[name].low_rank_term()
        if term is None:
            raise MethodError(
                f"adapter '{name}' does more at '{base.path}' than add scaling B A x, which is what Arrow mixes",
                hint="mix LoRA adapters without a bias; where they drop features in training, call model.eval()",
            )
        return term

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prototypes(
        self,
        owners: Sequence[Adapter],
        terms: Sequence[Factors],
        names: Sequence[str],
        adapters: Mapping[str, Adapter],
    ) -> Tensor:
        """Return (adapters, d_in) in float32 at least, from the last time if no value has changed since.

        A compiler leaves it out of its graph, in which one could not tell whether a value has changed.
        """
        held = [adapters[name] for name in names if name in adapters]
        state = tuple((id(t), t._version) for a in held for t in (*a.parameters(), *a.buffers()))
        known = self._known.get(owners[0])
        if known is None or known[0] != state:
            with torch.no_grad():
                known = state, torch.stack([leading_right_vector(A, B) for A, B, _ in terms])
            self._known[owners[0]] = known
        return known[1]

    @functools.cached_property
    def _known(self) -> WeakKeyDictionary[Adapter, tuple[object, Tensor]]:
        return WeakKeyDictionary()


def leading_right_vector(A: Tensor, B: Tensor) -> Tensor:
    """Return the right singular vector of B A with the largest singular value, (d_in,), never forming B A.

    Args:
        A: (rank, d_in).
        B: (d_out, rank).

    Returns:
        A vector of length 1, in float32 at least; its sign is arbitrary.

    Example:
        >>> leading_right_vector(torch.tensor([[3.0, 4.0]]), torch.ones(5, 1)).abs()
        tensor([0.6000, 0.8000])
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    Q, R = torch.linalg.qr(A.to(wide).t())
    _, _, Vh = torch.linalg.svd(torch.linalg.qr(B.to(wide), mode="r").R @ R.t())
    return cast(Tensor, Q @ Vh[0])


def _less(term: Factors, general: Sequence[Factors], name: str, base: Base) -> Factors:
    """The factors less the mean of the general ones."""
    if not general:
        return term
    A, B, scaling = term
    odd = sorted({len(other) for other, _, _ in general} - {len(A)})
    if odd:
        raise MethodError(
            f"'{name}' has rank {len(A)} at '{base.path}', and general adapters have rank {odd[0]}",
            hint="general adapters are subtracted factor by factor: give all of them one rank",
        )
    mean_A = torch.stack([other for other, _, _ in general]).mean(0)
    mean_B = torch.stack([other for _, other, _ in general]).mean(0)
    return A - mean_A, B - mean_B, scaling
