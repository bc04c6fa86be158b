"""LoRA-FA in PEFT's folder: trained, it is a LoRA, and read again as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.forms.lora import (
    KINDS,
    NAMES,
    READS,
    factors,
    layer_problems,
    low_rank_settings,
    read_low_rank,
)
from addenda.methods.lora_fa import LoRAFA, LoRAFAAdapter

__all__ = ["LoRAFAForm"]


@form
class LoRAFAForm(Form):
    """PEFT's ``LoraConfig``; what was frozen in training is not said there."""

    peft_type = "LORA"
    method = LoRAFA
    kinds: ClassVar[tuple[str, ...]] = KINDS
    reads: ClassVar[tuple[str, ...]] = READS
    names: ClassVar[tuple[str, ...]] = NAMES

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return False

    def settings(self, handle: Handle) -> dict[str, Any]:
        return low_rank_settings(handle)

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> LoRAFA:
        return LoRAFA(**read_low_rank(config))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(LoRAFAAdapter, adapter)
        return factors(ours.A, ours.B, layer)

    def problems(self, handle: Handle) -> list[str]:
        return layer_problems(handle)
