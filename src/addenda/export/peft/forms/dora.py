"""DoRA in PEFT's folder: LoRA's tensors, and ``lora_magnitude_vector`` (d_out,), a convolution's (1, d_out, 1, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.core.views import LayerView
from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import NAMES, READS, LowRankForm, low_rank_settings
from addenda.methods.dora import DoRA, DoRAAdapter, squared_rows

__all__ = ["DoRAForm"]


@form
class DoRAForm(LowRankForm):
    """PEFT's ``LoraConfig(use_dora=True)``."""

    method = DoRA
    reads: ClassVar[tuple[str, ...]] = (*READS, "use_dora")
    names: ClassVar[tuple[str, ...]] = (*NAMES, "lora_magnitude_vector")
    mark = "use_dora"

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**low_rank_settings(handle), "use_dora": True}

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        m: Tensor = cast(DoRAAdapter, adapter).m
        if layer.kind == "conv":
            m = m.view(1, -1, *[1] * len(cast(LayerView, layer).module.kernel_size))
        return {**super().tensors(adapter, layer), "lora_magnitude_vector": m}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        super().fill(adapter, layer, given)
        with torch.no_grad():  # PEFT works them out anew in each forward
            cast(DoRAAdapter, adapter).squares.copy_(squared_rows(layer.weight()))
