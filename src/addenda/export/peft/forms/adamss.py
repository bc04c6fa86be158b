"""AdaMSS in PEFT's folder: factors by group, and the frozen projection; which rows a group has is computed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.export.peft.reading import view_at
from addenda.methods.adamss import AdaMSS, AdaMSSAdapter, started

__all__ = ["AdaMSSForm"]

_MOST_GROUPS = 256


@form
class AdaMSSForm(Form):
    """PEFT's ``AdamssConfig``."""

    peft_type = "ADAMSS"
    method = AdaMSS
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "num_subspaces", "subspace_rank", "random_seed")
    harmless: ClassVar[tuple[str, ...]] = (
        "asa_importance_beta",
        "asa_schedule_exponent",
        "asa_target_subspaces",
        "asa_uncertainty_beta",
        "final_warmup",
        "init_warmup",
        "init_weights",
        "mask_interval",
        "svd_threshold",
        "use_asa",
    )
    names: ClassVar[tuple[str, ...]] = (
        "adamss_newB",
        *(f"adamss_{name}.{group}" for name in "AB" for group in range(_MOST_GROUPS)),
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(AdaMSS, handle.method)
        return {
            "r": method.basis_rank,
            "num_subspaces": method.subspaces,
            "subspace_rank": method.rank,
            "random_seed": method.seed,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return AdaMSS(
            basis_rank=config.get("r", 100),
            subspaces=config.get("num_subspaces", 5),
            rank=config.get("subspace_rank", 1),
            seed=config.get("random_seed", 0),
        )

    def problems(self, handle: Handle) -> list[str]:
        seed = cast(AdaMSS, handle.method).seed
        adapters = {path: cast(AdaMSSAdapter, adapter) for path, adapter in handle.adapters.items()}
        found = {path: _groups(adapter, view_at(handle, path), seed) for path, adapter in adapters.items()}
        moved = [path for path, adapter in adapters.items() if not torch.equal(found[path], _kept(adapter))]
        lost = [path for path, adapter in adapters.items() if _lost(adapter)]
        even = [path for path, adapter in adapters.items() if _even(adapter)]
        problems = [f"PEFT would group the rows of '{moved[0]}' otherwise"] if moved else []
        problems += [f"{_EVEN}, first '{even[0]}'"] if even else []
        return problems + ([f"a group of '{lost[0]}' has fewer rows than directions"] if lost else [])

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(AdaMSSAdapter, adapter)
        found: dict[str, Tensor] = {"adamss_newB": ours.V}
        for group, (rows, rank) in enumerate(_members(ours)):
            found[f"adamss_A.{group}"] = ours.A[group, :rank]
            found[f"adamss_B.{group}"] = ours.B[rows, :rank]
        return found

    def prepare(self, adapter: Adapter, layer: Base, method: Method) -> None:
        ours = cast(AdaMSSAdapter, adapter)
        if _even(ours):
            raise CheckpointError(
                f"{_EVEN}, such as '{layer.path}'", hint="train it with a lower r, or another method"
            )
        ours.groups.copy_(_groups(ours, layer, cast(AdaMSS, method).seed))

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(AdaMSSAdapter, adapter)
        with torch.no_grad():
            ours.V.copy_(given["adamss_newB"])
            for group, (rows, rank) in enumerate(_members(ours)):
                ours.A[group, :rank] = given[f"adamss_A.{group}"].to(ours.A)
                ours.B[rows, :rank] = given[f"adamss_B.{group}"].to(ours.B)


def _groups(adapter: AdaMSSAdapter, layer: Base, seed: int) -> Tensor:
    """Return the group of each row of a layer as PEFT forms them."""
    groups, rank, directions = adapter.A.shape
    return started(layer, directions, groups, rank, seed=seed)[2]


_EVEN = "PEFT groups rows that are all as far from each other, so that rounding decides"


def _even(adapter: AdaMSSAdapter) -> bool:
    """Whether the left singular vectors are a square matrix, whose rows are orthonormal."""
    return adapter.A.shape[2] == len(adapter.B) and len(adapter.A) > 1


def _kept(adapter: AdaMSSAdapter) -> Tensor:
    return adapter.groups.cpu().long()


def _members(adapter: AdaMSSAdapter) -> list[tuple[Tensor, int]]:
    """Return for each group its rows, and how many directions PEFT gives it."""
    groups, most, _ = adapter.A.shape
    rows = [(adapter.groups == group).nonzero()[:, 0] for group in range(groups)]
    return [(each, min(most, len(each))) for each in rows]


def _lost(adapter: AdaMSSAdapter) -> bool:
    """Whether a group is changed in directions that PEFT does not give it."""
    return any(
        bool((adapter.B[rows, rank:] @ adapter.A[group, rank:]).any())
        for group, (rows, rank) in enumerate(_members(adapter))
    )
