"""aLoRA in PEFT's folder: LoRA's tensors, and the invocation as ``alora_invocation_tokens``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.forms.lora import READS, LowRankForm, low_rank_settings, read_low_rank
from addenda.methods.alora import ALoRA

__all__ = ["ALoRAForm"]


@form
class ALoRAForm(LowRankForm):
    """PEFT's ``LoraConfig(alora_invocation_tokens=...)``."""

    method = ALoRA
    kinds: ClassVar[tuple[str, ...]] = Form.kinds
    reads: ClassVar[tuple[str, ...]] = (*READS, "alora_invocation_tokens")
    mark = "alora_invocation_tokens"

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
