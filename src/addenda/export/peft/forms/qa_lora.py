"""QA-LoRA in PEFT's folder: ``lora_A.weight`` (rank, groups), of which PEFT takes means where ours takes sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import HARMLESS, READS, LowRankForm, read_low_rank
from addenda.methods.qa_lora import QALoRA, QALoRAAdapter

__all__ = ["QALoRAForm"]


@form
class QALoRAForm(LowRankForm):
    """PEFT's ``LoraConfig(use_qalora=True)``, which it has for GPTQ's layers alone."""

    method = QALoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = (*READS, "use_qalora", "qalora_group_size")
    harmless: ClassVar[tuple[str, ...]] = tuple(key for key in HARMLESS if key != "qalora_group_size")
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")
    mark = "use_qalora"

    def settings(self, handle: Handle) -> dict[str, Any]:
        size = cast(QALoRA, handle.method).group_size
        return {**super().settings(handle), "use_qalora": True, "qalora_group_size": size}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> QALoRA:
        return QALoRA(**read_low_rank(config), group_size=config.get("qalora_group_size", 16))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(QALoRAAdapter, adapter)
        return {"lora_A.weight": ours.A / _factor(ours), "lora_B.weight": ours.B}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(QALoRAAdapter, adapter)
        with torch.no_grad():
            ours.A.copy_(given["lora_A.weight"] * _factor(ours))
            ours.B.copy_(given["lora_B.weight"])


def _factor(adapter: QALoRAAdapter) -> float:
    """What PEFT multiplies the sum of a group with: the number of groups over their size."""
    return adapter.A.shape[1] / adapter.group_size
