"""VeRA in PEFT's folder: two vectors a layer, and the frozen pair once, as ``vera_A`` and ``vera_B``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.products import FrozenPair
from addenda.export.peft.form import SHARED_PREFIX, Form, agreed, form, layers_of, seeded
from addenda.methods.vera import VeRA, VeRAAdapter, kaiming_uniform

__all__ = ["VeRAForm", "drawn_pair"]


@form
class VeRAForm(Form):
    """PEFT's ``VeraConfig``."""

    peft_type = "VERA"
    method = VeRA
    reads: ClassVar[tuple[str, ...]] = ("r", "d_initial", "projection_prng_key", "save_projection")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "vera_dropout")
    names: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d")
    shared_names: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(VeRA, handle.method)
        return {
            "r": method.rank,
            "d_initial": method.d_initial,
            "save_projection": True,
            "vera_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return VeRA(rank=config.get("r", 256), d_initial=config.get("d_initial", 0.1))

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        found = dict(tensors)
        if not config.get("save_projection", True) and f"{SHARED_PREFIX}vera_A" not in found:
            rank = agreed(config, "r", 256, (len(t) for k, t in found.items() if k.endswith("lambda_d")))
            pair = drawn_pair(model, config, rows=rank, rank=rank)
            found.update(zip((SHARED_PREFIX + name for name in self.shared_names), pair, strict=True))
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(VeRAAdapter, adapter)
        return {"vera_lambda_b": ours.b, "vera_lambda_d": ours.d}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        pair = cast(FrozenPair, common)
        return {"vera_A": pair.A, "vera_B": pair.B}


def drawn_pair(model: nn.Module, config: Mapping[str, Any], *, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Draw A: (rows, largest d_in) and B: (largest d_out, rank) as PEFT does where it has not saved them."""
    layers = layers_of(model, config).values()
    A = torch.empty(rows, max(layer.d_in for layer in layers))
    B = torch.empty(max(layer.d_out for layer in layers), rank)
    generator = seeded(config, "projection_prng_key", 0)
    for factor in (A, B):
        kaiming_uniform(factor, generator)
    return A, B
