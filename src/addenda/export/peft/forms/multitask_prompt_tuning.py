"""Multitask prompt tuning in PEFT's folder: the shared prompt, and each task's ``prefix_task_cols`` and ``_rows``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.prompts import EMBEDDINGS, PromptForm
from addenda.methods.multitask_prompt_tuning import MultitaskPromptAdapter, MultitaskPromptTuning

__all__ = ["MultitaskPromptTuningForm"]


@form
class MultitaskPromptTuningForm(PromptForm):
    """PEFT's ``MultitaskPromptTuningConfig``; PEFT is told each sample's task with every call, here 0 is the usual."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    method = MultitaskPromptTuning
    why_unasked = "peft's model asks for more than the tokens"
    reads: ClassVar[tuple[str, ...]] = (*PromptForm.measures, "num_ranks", "num_tasks")
    harmless: ClassVar[tuple[str, ...]] = (
        "prompt_tuning_init",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    )
    names: ClassVar[tuple[str, ...]] = (EMBEDDINGS, "prefix_task_cols", "prefix_task_rows")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(MultitaskPromptTuning, handle.method)
        return {
            **super().settings(handle),
            "num_ranks": method.rank,
            "num_tasks": method.tasks,
            "prompt_tuning_init": "RANDOM",
        }

    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        return MultitaskPromptTuning(
            tokens=len(tensors[EMBEDDINGS]), tasks=config.get("num_tasks", 1), rank=config.get("num_ranks", 1)
        )

    def embeddings(self, adapter: Adapter) -> Tensor:
        return cast(MultitaskPromptAdapter, adapter).P

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(MultitaskPromptAdapter, adapter)
        return {EMBEDDINGS: ours.P, "prefix_task_cols": ours.U, "prefix_task_rows": ours.V}
