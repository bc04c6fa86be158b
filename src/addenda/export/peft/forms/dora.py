"""DoRA in PEFT's folder: LoRA's tensors, and ``lora_magnitude_vector`` (d_out,), a convolution's (1, d_out, 1, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.core.views import LayerView
from addenda.export.peft.form import Form, form
from addenda.export.peft.forms.lora import (
    HARMLESS,
    KINDS,
    NAMES,
    READS,
    factors,
    layer_problems,
    low_rank_settings,
    read_low_rank,
)
from addenda.methods.dora import DoRA, DoRAAdapter, squared_rows

__all__ = ["DoRAForm"]


@form
class DoRAForm(Form):
    """PEFT's ``LoraConfig(use_dora=True)``."""

    peft_type = "LORA"
    method = DoRA
    kinds: ClassVar[tuple[str, ...]] = KINDS
    reads: ClassVar[tuple[str, ...]] = (*READS, "use_dora")
    harmless: ClassVar[tuple[str, ...]] = HARMLESS
    names: ClassVar[tuple[str, ...]] = (*NAMES, "lora_magnitude_vector")

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("use_dora"))

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**low_rank_settings(handle), "use_dora": True}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> DoRA:
        return DoRA(**read_low_rank(config))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(DoRAAdapter, adapter)
        m: Tensor = ours.m
        if layer.kind == "conv":
            m = m.view(1, -1, *[1] * len(cast(LayerView, layer).module.kernel_size))
        return {**factors(ours.A, ours.B, layer), "lora_magnitude_vector": m}

    def problems(self, handle: Handle) -> list[str]:
        return layer_problems(handle)

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        super().fill(adapter, layer, given)
        with torch.no_grad():  # PEFT works them out anew in each forward
            cast(DoRAAdapter, adapter).squares.copy_(squared_rows(layer.weight()))
