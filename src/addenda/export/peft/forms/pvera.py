"""PVeRA in PEFT's folder: two vectors a layer, and the frozen pair once, as ``pvera_A`` and ``pvera_B``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import SHARED_PREFIX, Form, form, layers_of
from addenda.methods.pvera import NoisyProjections, PVeRA, PVeRAAdapter, kaiming_uniform

__all__ = ["PVeRAForm"]


@form
class PVeRAForm(Form):
    """PEFT's ``PveraConfig``."""

    peft_type = "PVERA"
    method = PVeRA
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "d_initial",
        "sample_at_inference",
        "projection_prng_key",
        "save_projection",
    )
    harmless: ClassVar[tuple[str, ...]] = ("generator_seed", "init_weights", "pvera_dropout")
    names: ClassVar[tuple[str, ...]] = ("pvera_lambda_b", "pvera_lambda_d")
    shared_names: ClassVar[tuple[str, ...]] = ("pvera_A", "pvera_B")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(PVeRA, handle.method)
        return {
            "r": method.rank,
            "d_initial": method.d_initial,
            "sample_at_inference": method.sample == "always",
            "save_projection": True,
            "pvera_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        sample = "always" if config.get("sample_at_inference") else "training"
        return PVeRA(rank=config.get("r", 256), d_initial=config.get("d_initial", 0.1), sample=sample)

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Draw the pair as PEFT does where it has not saved it."""
        found = dict(tensors)
        shared = [SHARED_PREFIX + name for name in self.shared_names]
        if not config.get("save_projection", True) and not any(name in found for name in shared):
            layers, rank = layers_of(model, config).values(), config.get("r", 256)
            generator = torch.Generator().manual_seed(config.get("projection_prng_key") or 0)
            A = torch.empty(2 * rank, max(layer.d_in for layer in layers))
            B = torch.empty(max(layer.d_out for layer in layers), rank)
            for name, tensor in zip(shared, (A, B), strict=True):
                kaiming_uniform(tensor, generator)
                found[name] = tensor
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(PVeRAAdapter, adapter)
        return {"pvera_lambda_b": ours.b, "pvera_lambda_d": ours.d}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        pair = cast(NoisyProjections, common)
        return {"pvera_A": pair.A, "pvera_B": pair.B}
