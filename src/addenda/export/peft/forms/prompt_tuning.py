"""Prompt tuning in PEFT's folder: ``prompt_embeddings`` (tokens, width)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.prompts import EMBEDDINGS, PromptForm
from addenda.methods.prompt_tuning import PromptTuning, PromptTuningAdapter

__all__ = ["PromptTuningForm"]


@form
class PromptTuningForm(PromptForm):
    """PEFT's ``PromptTuningConfig``."""

    peft_type = "PROMPT_TUNING"
    method = PromptTuning
    reads: ClassVar[tuple[str, ...]] = PromptForm.measures
    harmless: ClassVar[tuple[str, ...]] = (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**super().settings(handle), "prompt_tuning_init": "RANDOM"}

    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        return PromptTuning(tokens=len(tensors[EMBEDDINGS]))

    def embeddings(self, adapter: Adapter) -> Tensor:
        return cast(PromptTuningAdapter, adapter).P
