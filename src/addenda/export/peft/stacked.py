"""LoRA on modules that hold several weights, which PEFT gives one pair of factors for each parameter.

``nn.MultiheadAttention``: one pair for the packed projections of query, key and value, under the module's path, and
one of the same rank for the output's, under ``base_layer.out_proj``. Stacked experts: one pair for all experts of a
``target_parameters`` entry, the ranks of one expert after another in A and interleaved in B; entries of the same
module are nested in the order of its parameters, the last one outermost. Both directions are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.handle import Handle
from addenda.core.layers import layer_at, parts_of
from addenda.core.layers.attention import AttentionPart
from addenda.core.layers.experts import ExpertPart
from addenda.core.parts import Part
from addenda.core.targets import adaptable, matches
from addenda.errors import CheckpointError
from addenda.export.peft.form import PREFIX
from addenda.methods.lora import LoRA

__all__ = ["apart", "is_target", "problems", "target_of", "together"]

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class _Pair:
    """The A and B that PEFT keeps for several parts together."""

    key: str
    """Their name before ``.lora_A.weight``."""
    setting: str
    """The module, or the parameter, that rank and alpha are looked up by."""
    parts: tuple[str, ...]
    """Paths of the parts, in the order in which they lie in the parameter."""
    experts: bool = False
    factor: float = 1.0
    """How often PEFT adds the product."""

    @property
    def stacked(self) -> int:
        """How many times the rank A has rows."""
        return len(self.parts) if self.experts else 1

    def split(self, A: Tensor, B: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yield each part with its factors."""
        count = len(self.parts)
        if self.experts:
            of_each = A.unflatten(0, (count, -1)), B.unflatten(1, (-1, count)).movedim(-1, 0)
        else:
            of_each = A.expand(count, -1, -1), (self.factor * B).unflatten(0, (count, -1))
        return zip(self.parts, zip(*of_each, strict=True), strict=True)

    def join(self, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return A and B of all parts, given those of each, of equal rank."""
        A, B = [a for a, _ in factors], [b for _, b in factors]
        if self.experts:
            return torch.cat(A), torch.stack(B, dim=-1).flatten(1)
        if all(torch.equal(a, A[0]) for a in A):
            return A[0], torch.cat(B) / self.factor
        return torch.cat(A), torch.block_diag(*B)


def target_of(path: str, layer: nn.Module) -> str:
    """Return what PEFT targets to adapt a layer: the module at ``path``, or what the part there is a part of."""
    if not isinstance(layer, Part):
        return path
    owner = path.removesuffix(layer.name).removesuffix(".")
    return f"{owner}.{layer.name.rpartition('.')[2]}" if isinstance(layer, ExpertPart) else owner


def is_target(path: str, layer: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt the layer under this configuration, whose targets are listed."""
    entries = config.get("target_parameters" if isinstance(layer, ExpertPart) else "target_modules") or []
    return any(matches(target_of(path, layer), entry) for entry in entries)


def _pairs(model: nn.Module, parameters: Sequence[str]) -> Iterator[_Pair]:
    """Yield PEFT's pairs on the model, those of experts where an entry of ``parameters`` names them."""
    for path, module in model.named_modules():
        prefix, found = f"{path}." if path else "", parts_of(module)
        first = next(iter(found.values()), None)
        if isinstance(first, AttentionPart):
            packed = tuple(f"{prefix}{name}" for name in found if name != "out_proj")
            yield _Pair(path, path, packed)
            # PEFT (0.21) folds the output's product into the weight itself and has its layer there fold it once more.
            yield _Pair(f"{prefix}base_layer.out_proj", path, (f"{prefix}out_proj",), factor=2.0)
        if isinstance(first, ExpertPart):
            stacks = dict.fromkeys(name.rpartition(".")[2] for name in found)
            order = [name for name, _ in module.named_parameters(recurse=False) if name in stacks]
            taken = [s for s in order if any(matches(f"{prefix}{s}", entry) for entry in parameters)]
            for depth, stack in enumerate(reversed(taken)):
                parts = tuple(f"{prefix}{name}" for name in found if name.endswith(f".{stack}"))
                yield _Pair(path + ".base_layer" * depth, f"{prefix}{stack}", parts, experts=True)


def problems(handle: Handle) -> list[str]:
    """Return why PEFT has no form for some of the adapters."""
    found = []
    for path in handle.paths:
        layer = layer_at(handle.model, path)
        if isinstance(layer, AttentionPart) and layer.name != "out_proj" and layer.weight_at.rows is None:
            found.append(f"'{path}' is a separate projection, and PEFT adapts packed ones alone")
        if isinstance(layer, Part) and cast(LoRA, handle.method).bias:
            found.append(f"'{path}' is part of a module, where PEFT trains no bias")
    return found[:1]


def apart(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a configuration and tensors of PEFT's as they would be if each part were a layer.

    Raises:
        CheckpointError: the factors do not fit the module.
    """
    found, rest = dict(config), dict(tensors)
    pairs = list(_pairs(model, config.get("target_parameters") or []))
    for pair in pairs:
        A, B = (rest.pop(f"{PREFIX}{pair.key}{name}", None) for name in (_A, _B))
        if A is None or B is None:
            continue
        try:
            each = list(pair.split(A, B))
        except (RuntimeError, ValueError) as problem:
            raise CheckpointError(
                f"'{pair.key}' holds factors of another size: {tuple(A.shape)} and {tuple(B.shape)}",
                where={"parts": len(pair.parts)},
                hint="load it onto the model that it was trained on",
            ) from problem
        for path, factors in each:
            rest.update(dict(zip((f"{PREFIX}{path}{_A}", f"{PREFIX}{path}{_B}"), factors, strict=True)))
    others = [path for path, (layer, _) in adaptable(model).items() if not isinstance(layer, Part)]
    for name in ("rank_pattern", "alpha_pattern"):
        found[name] = _for_parts(config.get(name) or {}, pairs, others)
    return found, rest


def _for_parts(pattern: Mapping[str, Any], pairs: Sequence[_Pair], others: Sequence[str]) -> dict[str, Any]:
    """Return a pattern with the entries that name what parts belong to spelled out part by part."""
    spelled: dict[str, Any] = {}
    for name, value in pattern.items():
        parts = [part for pair in pairs if matches(pair.setting, name) for part in pair.parts]
        if not parts or any(matches(path, name) for path in others):
            parts = [*parts, name]
        for part in parts:
            spelled.setdefault(part, value)  # PEFT takes the first entry that matches
    return spelled


def together(
    handle: Handle, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a configuration and tensors that name each part as PEFT keeps them."""
    method, adapted, rest = cast(LoRA, handle.method), handle.adapters, dict(tensors)
    parts = {path: layer for path in handle.paths if isinstance(layer := layer_at(handle.model, path), Part)}
    entries = {target_of(path, layer) for path, layer in parts.items() if isinstance(layer, ExpertPart)}
    found = {**config, "target_parameters": sorted(entries) or None}
    ranks, alphas = (
        {key: value for key, value in config[name].items() if key not in parts}
        for name in ("rank_pattern", "alpha_pattern")
    )
    by_setting: dict[str, list[_Pair]] = {}
    for pair in _pairs(handle.model, sorted(entries)):
        by_setting.setdefault(pair.setting, []).append(pair)
    for setting, pairs in by_setting.items():
        own = [path for pair in pairs for path in pair.parts if path in adapted]
        if not own:
            continue
        scalings = {method.scaling_at(path) for path in own}
        scaling = scalings.pop() if len(scalings) == 1 else None
        joined = [_joined(handle, pair, rest, scaling) for pair in pairs]
        rank = max(len(A) for A, _ in joined) // pairs[0].stacked
        for pair, (A, B) in zip(pairs, joined, strict=True):
            rest[f"{PREFIX}{pair.key}{_A}"], rest[f"{PREFIX}{pair.key}{_B}"] = _of_rank(
                rank * pair.stacked, A, B
            )
        ranks[setting] = rank
        alphas[setting] = _number((scaling or 1.0) * (math.sqrt(rank) if method.rank_stabilized else rank))
    found["rank_pattern"] = {key: value for key, value in ranks.items() if value != config["r"]}
    found["alpha_pattern"] = {key: value for key, value in alphas.items() if value != config["lora_alpha"]}
    return found, rest


def _joined(
    handle: Handle, pair: _Pair, tensors: dict[str, Tensor], scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Take a pair's parts out of the tensors and join them; without a common scaling, B is scaled by each one's own."""
    method, given = cast(LoRA, handle.method), {}
    for path in pair.parts:
        if f"{PREFIX}{path}{_A}" in tensors:
            A, B = (tensors.pop(f"{PREFIX}{path}{name}") for name in (_A, _B))
            given[path] = A, B if scaling is not None else B * method.scaling_at(path)
    rank = max((len(A) for A, _ in given.values()), default=1)
    some = next((A for A, _ in given.values()), None)
    factors = []
    for path in pair.parts:
        weight = cast(Part, layer_at(handle.model, path)).weight
        d_out, d_in = weight.shape
        nothing = (
            torch.zeros(rank, d_in) if some is None or pair.experts else some,
            torch.zeros(d_out, rank if some is None or pair.experts else len(some)),
        )
        factors.append(_of_rank(rank, *given.get(path, nothing)))
    return pair.join(factors)


def _of_rank(rank: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product with rows and columns of zeros added."""
    added = rank - len(A)
    return F.pad(A, (0, 0, 0, added)).contiguous(), F.pad(B, (0, added)).contiguous()


def _number(value: float) -> int | float:
    # The way through the scaling costs the last bit; 12 digits give back the number that was set.
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value
