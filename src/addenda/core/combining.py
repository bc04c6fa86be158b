"""One low-rank adapter made of several: by concatenation, arithmetic on factors, or arithmetic on whole updates."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core import registry
from addenda.core.activating import active_composition
from addenda.core.attaching import attach_paths
from addenda.core.composition import Stack, Sum
from addenda.core.contract import Adapter, Method
from addenda.core.handle import Handle, _registry, handles
from addenda.core.ranges import integer, number
from addenda.core.targets import adaptable
from addenda.errors import ConfigError, MethodError, NotFoundError

__all__ = ["WAYS", "combine"]

WAYS = ("cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Ways of combining; all but ``cat`` also with ``_svd``, and ``svd`` for ``linear_svd``."""

_SIGNS = ("total", "frequency")


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    seed: int = 0,
) -> Handle:
    """Make one LoRA adapter of several low-rank ones; they stay as they are, and what is active stays so too.

    Args:
        model: carries the adapters, which may stand on different layers.
        weights: the adapters by name, each with its weight; negative ones take an effect away.
        name: of the new adapter.
        how: ``cat`` puts the factors side by side, which is exactly ``Sum(weights)``, at the sum of the ranks.
            ``linear`` adds A to A and B to B, each by the root of its weight, which keeps the rank and mixes the
            adapters. ``ties`` (arXiv:2306.01708), ``dare_linear`` and ``dare_ties`` (arXiv:2311.03099) and
            ``magnitude_prune`` thin the factors out before they are added. With ``_svd`` at the end each works on the
            whole updates B A instead, and the sum is cut to ``rank`` by a singular value decomposition; ``svd`` alone
            is the sum.
        rank: of the result, for the ``svd`` ways; None takes the largest of the adapters'.
        density: share of the numbers that thinning keeps, in (0, 1]; required by the ways that thin out.
        sign: for ``ties``, which sign counts: of the ``total``, or the more ``frequency`` one.
        seed: for ``dare``, which draws what is dropped.

    Returns:
        The handle on the new adapter, which is frozen and not active: ``addenda.activate(model, name)``.

    Raises:
        NotFoundError: the model carries no adapter of one of the names.
        ConfigError: a setting is wrong; all problems are named.
        MethodError: an adapter is not low-rank, or the ranks do not suit the way.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> for part in ("law", "style"):
        ...     _ = addenda.attach(model, addenda.LoRA(rank=1), targets=["0"], name=part)
        >>> addenda.combine(model, {"law": 0.7, "style": 0.3}, name="both").method.rank
        2
    """
    way = _Way(how, rank, density, sign, seed)
    way.require_sound(weights)
    on_model = handles(model)
    unknown = [part for part in weights if part not in on_model]
    if unknown:
        raise NotFoundError(
            f"the model carries no adapter '{unknown[0]}'",
            where={"adapters": " ".join(on_model) or "none"},
            hint="attach or load it first",
        )
    terms = _terms({part: on_model[part] for part in weights}, weights)
    made = {path: way.factors(path, found) for path, found in terms.items()}
    ranks = {path: len(A) for path, (A, _) in made.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: each for path, each in ranks.items() if each != usual}
    alphas = {path: float(each) for path, each in others.items()}
    method = registry.get("lora").from_settings(
        {"rank": usual, "alpha": float(usual), "ranks": others, "alphas": alphas}
    )
    paths = [path for path in adaptable(model) if path in made]
    return _attached(model, method, paths, name, made)


@dataclass(frozen=True)
class _Way:
    how: str
    rank: int | None
    density: float | None
    sign: str
    seed: int

    @property
    def whole(self) -> bool:
        """Whether it works on whole updates instead of their factors."""
        return self.how == "svd" or self.how.endswith("_svd")

    @property
    def arithmetic(self) -> str:
        return "linear" if self.how == "svd" else self.how.removesuffix("_svd")

    def require_sound(self, weights: Mapping[str, float]) -> None:
        found = [] if weights else ["no adapter is named"]
        try:
            Sum(weights)
        except ConfigError as problem:
            found.append(problem.message)
        if self.arithmetic not in WAYS or self.how == "cat_svd":
            ways = ", ".join([*WAYS, "svd", *(f"{way}_svd" for way in WAYS[2:])])
            found.append(f"how must be one of {ways}, got {self.how!r}")
        if self.sign not in _SIGNS:
            found.append(f"sign must be one of {', '.join(_SIGNS)}, got {self.sign!r}")
        found += [] if self.rank is None else integer("rank", self.rank)
        thins = self.arithmetic not in ("cat", "linear")
        if thins and self.density is None:
            found.append(f"'{self.how}' needs a density")
        if self.density is not None:
            wrong = number("density", self.density, above=0.0)
            found += wrong or (["density must be at most 1"] if self.density > 1 else [])
        if found:
            raise ConfigError("; ".join(found), hint="see help(addenda.combine)")

    def factors(self, path: str, terms: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
        """Combine the (A, B, weight) of one layer into one A and B."""
        if self.how == "cat":
            return torch.cat([A for A, _, _ in terms]), torch.cat([B * weight for _, B, weight in terms], 1)
        if self.whole:
            rank = self.rank or max(len(A) for A, _, _ in terms)
            total = self._added(path, [B @ A for A, B, _ in terms], [weight for _, _, weight in terms])
            U, S, Vh = torch.linalg.svd(total, full_matrices=False)
            rank = min(rank, len(S))
            return Vh[:rank], U[:, :rank] * S[:rank]
        ranks = {len(A) for A, _, _ in terms}
        if len(ranks) > 1:
            raise MethodError(
                f"'{self.how}' adds factors, and those at '{path}' have different ranks: {sorted(ranks)}",
                hint=f"use 'cat', or '{'svd' if self.how == 'linear' else self.how + '_svd'}'",
            )
        roots = [math.sqrt(abs(weight)) for _, _, weight in terms]
        signed = [math.copysign(root, weight) for root, (_, _, weight) in zip(roots, terms, strict=True)]
        return (
            self._added(f"{path}.A", [A for A, _, _ in terms], signed),
            self._added(f"{path}.B", [B for _, B, _ in terms], roots),
        )

    def _added(self, place: str, parts: list[Tensor], weights: list[float]) -> Tensor:
        """Thin the parts out, and add them up by their weights."""
        density = 1.0 if self.density is None else self.density
        if self.arithmetic.startswith("dare"):
            generator = torch.Generator().manual_seed(_seed(self.seed, place))
            parts = [_dropped(part, density, generator) for part in parts]
        elif self.arithmetic in ("ties", "magnitude_prune"):
            parts = [_largest(part, density) for part in parts]
        stack = torch.stack(parts)
        weighted = stack * torch.tensor(weights, dtype=stack.dtype).view(-1, *[1] * parts[0].dim())
        if not self.arithmetic.endswith("ties"):
            return weighted.sum(0)
        # TIES, section 3.2: of each number only the parts of the elected sign are averaged.
        votes = stack if self.sign == "total" else stack.sign()
        elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        agree = stack.sign() == elected
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(part: Tensor, density: float) -> Tensor:
    """Keep the largest numbers by magnitude, that share of them."""
    kept = torch.zeros_like(part).view(-1)
    kept[part.abs().reshape(-1).topk(int(density * part.numel())).indices] = 1
    return part * kept.view_as(part)


def _dropped(part: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep a random share of the numbers, made larger so that the sum is expected to stay."""
    kept = torch.empty_like(part).bernoulli_(density, generator=generator)
    return part * kept / density


def _seed(seed: int, place: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8], "big") >> 1


def _terms(
    parts: Mapping[str, Handle], weights: Mapping[str, float]
) -> dict[str, list[tuple[Tensor, Tensor, float]]]:
    """The (A, B, weight times scaling) of every adapter on each layer, on the CPU in float32 at least."""
    found: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for name, handle in parts.items():
        for path, adapter in handle.adapters.items():
            term = _frozen(adapter)
            if term is None:
                raise MethodError(
                    f"adapter '{name}' ({handle.method.name}) is not low-rank at '{path}'",
                    hint="only adapters that add B A to a weight are combined; activate(model, Sum(...)) runs any",
                )
            A, B, scaling = term
            found.setdefault(path, []).append((A, B, scaling * weights[name]))
    return found


def _frozen(adapter: Adapter) -> tuple[Tensor, Tensor, float] | None:
    mode = adapter.training
    try:
        with torch.no_grad():
            term = adapter.eval().low_rank_term()
    finally:
        adapter.train(mode)
    if term is None:
        return None
    A, B = (factor.detach().cpu().to(torch.promote_types(factor.dtype, torch.float32)) for factor in term[:2])
    return A, B, term[2]


def _attached(
    model: nn.Module,
    method: Method,
    paths: list[str],
    name: str,
    made: Mapping[str, tuple[Tensor, Tensor]],
) -> Handle:
    def fill(handle: Handle) -> None:
        with torch.no_grad():
            for path, adapter in handle.adapters.items():
                for half, value in zip("AB", made[path], strict=True):
                    adapter.get_parameter(half).copy_(value)

    selection, before = _registry(model).selection, active_composition(model)
    selection.composition = Stack()
    try:
        handle = attach_paths(model, method, paths, name=name, fill=fill)
    finally:
        selection.composition = before
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    return handle
