"""FRoD in PEFT's folder: the trained numbers of each layer, and basis and places of each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import SHARED_PREFIX, Form, form, layers_of
from addenda.methods.frod import (
    Basis,
    FRoD,
    FRoDAdapter,
    Roles,
    directions,
    joint_basis,
    off_diagonal,
    role_of,
)

__all__ = ["FRoDForm"]


@form
class FRoDForm(Form):
    """PEFT's ``FrodConfig``."""

    peft_type = "FROD"
    method = FRoD
    reads: ClassVar[tuple[str, ...]] = (
        "sparse_rate",
        "regularization_alpha",
        "projection_prng_key",
        "save_projection",
    )
    harmless: ClassVar[tuple[str, ...]] = (
        "frod_dropout",
        "init_weights",
        "progressbar",
        "runtime_offload_base_weight",
    )
    names: ClassVar[tuple[str, ...]] = ("frod_lambda_l", "frod_lambda_s_values")
    shared_names: ClassVar[tuple[str, ...]] = ("frod_V", "frod_s_indices", "frod_s_size")
    integers: ClassVar[tuple[str, ...]] = shared_names[1:]

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(FRoD, handle.method)
        return {
            "sparse_rate": method.share,
            "regularization_alpha": method.ridge,
            "save_projection": True,
            "progressbar": False,
            "frod_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return FRoD(share=config.get("sparse_rate", 0.01), ridge=config.get("regularization_alpha", 1e-3))

    def problems(self, handle: Handle) -> list[str]:
        roles = cast(Roles, next(iter(handle.adapters.values())).common).of
        names = [role.rpartition("-")[0] for role in roles]
        twice = sorted({name for name in names if names.count(name) > 1})
        return (
            [f"PEFT asks that layers of one role be of one width, and '{twice[0]}' are not"] if twice else []
        )

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Decompose and draw as PEFT does where it has not saved basis and places."""
        found = dict(tensors)
        if config.get("save_projection", True) or any(k.startswith(f"{SHARED_PREFIX}frod_") for k in found):
            return dict(config), found
        method = cast(FRoD, self.read_settings(config, (), found))
        roles: dict[str, list[Base]] = {}
        for path, layer in layers_of(model, config).items():
            roles.setdefault(role_of(path), []).append(layer)
        generator = torch.Generator().manual_seed(config.get("projection_prng_key") or 0)
        for role, layers in sorted(roles.items()):
            size = layers[0].d_in
            basis = joint_basis([layer.weight() for layer in layers], method.ridge)
            places = off_diagonal(size, method.count(size), generator)
            for name, tensor in zip(
                self.shared_names, (basis, places, torch.tensor([size, size])), strict=True
            ):
                found[f"{SHARED_PREFIX}{name}.{role}"] = tensor
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(FRoDAdapter, adapter)
        return {"frod_lambda_l": ours.lengths, "frod_lambda_s_values": ours.mixing}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        """Write the trained numbers; what is frozen follows from the layer and the basis, which is there already."""
        super().fill(adapter, layer, given)
        ours = cast(FRoDAdapter, adapter)
        U, lengths = directions(layer.weight(), ours.basis.V)
        ours.U.copy_(U)
        ours.start.copy_(lengths)

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for role, made in cast(Roles, common).of.items():
            basis, name = cast(Basis, made), role.rpartition("-")[0]
            size = len(basis.V)
            found[f"frod_V.{name}"] = basis.V
            found[f"frod_s_indices.{name}"] = basis.places
            found[f"frod_s_size.{name}"] = torch.tensor([size, size])
        return found
