"""LoRA-FA in PEFT's folder: trained, it is a LoRA, and read again as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import LowRankForm
from addenda.methods.lora_fa import LoRAFA

__all__ = ["LoRAFAForm"]


@form
class LoRAFAForm(LowRankForm):
    """PEFT's ``LoraConfig``; what was frozen in training is not said there."""

    method = LoRAFA

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return False
