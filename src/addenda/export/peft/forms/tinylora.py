"""TinyLoRA in PEFT's folder: numbered ``tinylora_v``, and of each layer the frozen factors and mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import PREFIX, Form, form, layers_of
from addenda.methods.tinylora import TinyLoRA, TinyLoRAAdapter, Vectors

__all__ = ["TinyLoRAForm"]


@form
class TinyLoRAForm(Form):
    """PEFT's ``TinyLoraConfig``."""

    peft_type = "TINYLORA"
    method = TinyLoRA
    kinds: ClassVar[tuple[str, ...]] = (*Form.kinds, "embedding")
    reads: ClassVar[tuple[str, ...]] = ("r", "u", "weight_tying", "projection_seed", "save_projection")
    harmless: ClassVar[tuple[str, ...]] = ("init_v_bound", "init_weights", "tinylora_dropout")
    names: ClassVar[tuple[str, ...]] = ("tinylora_A", "tinylora_B", "tinylora_P")
    shared_names: ClassVar[tuple[str, ...]] = ("tinylora_v",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(TinyLoRA, handle.method)
        return {
            "r": method.rank,
            "u": method.size,
            "weight_tying": method.tying,
            "save_projection": True,
            "tinylora_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return TinyLoRA(
            rank=config.get("r", 2), size=config.get("u", 64), tying=config.get("weight_tying", 0.0)
        )

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Draw the mixtures as PEFT does where it has not saved them: each layer from a seed of its own."""
        found = dict(tensors)
        if not config.get("save_projection", True) and not any(k.endswith(".tinylora_P") for k in found):
            rank, size, seed = config.get("r", 2), config.get("u", 64), config.get("projection_seed", 42)
            for i, path in enumerate(layers_of(model, config, self.kinds)):
                generator = torch.Generator().manual_seed(seed + i)
                drawn = torch.normal(0.0, rank**-0.5, size=(size, rank, rank), generator=generator)
                found[f"{PREFIX}{path}.tinylora_P"] = drawn
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(TinyLoRAAdapter, adapter)
        if layer.kind == "embedding":  # PEFT decomposes what is the transpose of our matrix
            return {
                "tinylora_A": ours.B.t(),
                "tinylora_B": ours.A.t(),
                "tinylora_P": ours.P.transpose(1, 2),
            }
        return {"tinylora_A": ours.A, "tinylora_B": ours.B, "tinylora_P": ours.P}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        return {f"tinylora_v.{i}": v for i, v in enumerate(cast(Vectors, common).v)}
