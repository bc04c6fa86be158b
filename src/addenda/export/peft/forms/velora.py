"""VeLoRA in PEFT's folder: LoRA's tensors and the direction, ``lora_velora_embed`` (d_in / groups,)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import READS, LowRankForm, read_low_rank
from addenda.methods.velora import VeLoRA, VeLoRAAdapter

__all__ = ["VeLoRAForm"]

_WORDS = {"once": "batch_average_once", "each": "batch_average", "random": "random"}


@form
class VeLoRAForm(LowRankForm):
    """PEFT's ``LoraConfig(velora_config=...)``."""

    method = VeLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    reads: ClassVar[tuple[str, ...]] = (*READS, "velora_config")
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "lora_velora_embed")
    mark = "velora_config"

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(VeLoRA, handle.method)
        compression = {
            "num_groups": method.groups,
            "scale": method.scale,
            "init_type": _WORDS[method.direction],
        }
        return {**super().settings(handle), "velora_config": compression}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> VeLoRA:
        given = config["velora_config"]
        word = given.get("init_type", "batch_average")
        return VeLoRA(
            **read_low_rank(config),
            groups=given.get("num_groups", 64),
            scale=given.get("scale", 1.0),
            direction=next((ours for ours, theirs in _WORDS.items() if theirs == word), word),
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {**super().tensors(adapter, layer), "lora_velora_embed": cast(VeLoRAAdapter, adapter).v}
