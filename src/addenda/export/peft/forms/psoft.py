"""PSOFT in PEFT's folder: Q and the two vectors of each layer; the subspace is found again in the base's weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.rotations import exact_and_terms, series_problems
from addenda.methods.psoft import PSOFT, PSOFTAdapter

__all__ = ["PSOFTForm"]


@form
class PSOFTForm(Form):
    """PEFT's ``PsoftConfig``. Its alpha divides one factor and multiplies the product: it changes nothing."""

    peft_type = "PSOFT"
    method = PSOFT
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "ab_svd_init",
        "psoft_svd",
        "psoft_svd_lowrank_niter",
        "random_seed",
        "psoft_orth",
        "psoft_mag_a",
        "psoft_mag_b",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "cayley_neumann_eps",
    )
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "psoft_alpha", "psoft_dropout")
    names: ClassVar[tuple[str, ...]] = ("psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(PSOFT, handle.method)
        config: dict[str, Any] = {
            "r": method.rank,
            "psoft_alpha": method.rank,
            "psoft_dropout": 0.0,
            "ab_svd_init": "pissa_init" if method.symmetric else "psoft_init",
            "psoft_svd": "full" if method.iterations is None else "lowrank",
            "random_seed": method.seed,
            "psoft_orth": method.orthogonal,
            "psoft_mag_a": method.scale_input,
            "psoft_mag_b": method.scale_output,
            "use_cayley_neumann": not method.exact,
        }
        if not method.exact:
            config |= {"num_cayley_neumann_terms": method.terms, "cayley_neumann_eps": method.bound}
        return (
            config if method.iterations is None else {**config, "psoft_svd_lowrank_niter": method.iterations}
        )

    def problems(self, handle: Handle) -> list[str]:
        method = cast(PSOFT, handle.method)
        return series_problems(method.terms) if method.orthogonal and not method.exact else []

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        exact, terms = exact_and_terms(config)
        return PSOFT(
            rank=config.get("r", 32),
            scale_input=config.get("psoft_mag_a", True),
            scale_output=config.get("psoft_mag_b", True),
            orthogonal=config.get("psoft_orth", True),
            exact=exact,
            terms=terms,
            bound=None if exact else config.get("cayley_neumann_eps"),
            symmetric=config.get("ab_svd_init") == "pissa_init",
            iterations=config.get("psoft_svd_lowrank_niter", 10)
            if config.get("psoft_svd") == "lowrank"
            else None,
            seed=config.get("random_seed", 0),
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(PSOFTAdapter, adapter)
        found = {"psoft_R.weight": ours.core, "psoft_R.vector_a": ours.a, "psoft_R.vector_b": ours.b}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        super().fill(adapter, layer, given)
        ours = cast(PSOFTAdapter, adapter)
        with torch.no_grad():
            for place, found in zip((ours.A, ours.B), ours.settings.subspace(layer.weight()), strict=True):
                place.copy_(found)
