"""aLoRA in PEFT's folder: LoRA's tensors, and the invocation as ``alora_invocation_tokens``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.forms.lora import HARMLESS, READS, factors, low_rank_settings, read_low_rank
from addenda.methods.alora import ALoRA, ALoRAAdapter

__all__ = ["ALoRAForm"]


@form
class ALoRAForm(Form):
    """PEFT's ``LoraConfig(alora_invocation_tokens=...)``."""

    peft_type = "LORA"
    method = ALoRA
    reads: ClassVar[tuple[str, ...]] = (*READS, "alora_invocation_tokens")
    harmless: ClassVar[tuple[str, ...]] = HARMLESS
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("alora_invocation_tokens")) and not config.get("use_dora")

    def settings(self, handle: Handle) -> dict[str, Any]:
        invocation = list(cast(ALoRA, handle.method).invocation)
        # PEFT looks for the invocation in causal language models alone.
        return {
            **low_rank_settings(handle),
            "alora_invocation_tokens": invocation or None,
            "task_type": "CAUSAL_LM",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> ALoRA:
        return ALoRA(**read_low_rank(config), invocation=tuple(config["alora_invocation_tokens"]))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(ALoRAAdapter, adapter)
        return factors(ours.A, ours.B, layer)
