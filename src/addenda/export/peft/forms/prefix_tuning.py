"""Prefix tuning in PEFT's folder: ``prompt_embeddings`` (tokens, layers * 2 * heads * head_width), ready to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from addenda.core.contract import Method
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.prompts import EMBEDDINGS, PrefixForm
from addenda.methods.prefix_tuning import PrefixTuning

__all__ = ["PrefixTuningForm"]


@form
class PrefixTuningForm(PrefixForm):
    """PEFT's ``PrefixTuningConfig``; a projection is written and read as what it answers."""

    peft_type = "PREFIX_TUNING"
    method = PrefixTuning
    reads: ClassVar[tuple[str, ...]] = PrefixForm.measures
    harmless: ClassVar[tuple[str, ...]] = ("encoder_hidden_size", "init_weights", "prefix_projection")

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**super().settings(handle), "prefix_projection": False}

    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        return PrefixTuning(tokens=len(tensors[EMBEDDINGS]))
