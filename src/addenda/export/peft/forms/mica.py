"""MiCA in PEFT's folder: LoRA's tensors, with ``init_lora_weights`` saying that B was frozen."""

from __future__ import annotations

from typing import Any, ClassVar

from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import MICA, LowRankForm
from addenda.methods.mica import MiCA

__all__ = ["MiCAForm"]


@form
class MiCAForm(LowRankForm):
    """PEFT's ``LoraConfig(init_lora_weights="mica")``."""

    method = MiCA
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "embedding")
    mark = MICA

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**super().settings(handle), "init_lora_weights": MICA}
