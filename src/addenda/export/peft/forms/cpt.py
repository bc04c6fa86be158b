"""CPT in PEFT's folder: the embeddings as they were moved, ``prompt_embeddings`` (tokens, width)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.sequence import Inputs
from addenda.export.peft.form import form
from addenda.export.peft.prompts import EMBEDDINGS, PromptForm
from addenda.methods.cpt import CPT, CPTAdapter

__all__ = ["CPTForm"]


@form
class CPTForm(PromptForm):
    """PEFT's ``CPTConfig``; how far each embedding was moved is not kept apart from where it came from."""

    peft_type = "CPT"
    method = CPT
    reads: ClassVar[tuple[str, ...]] = (
        *PromptForm.measures,
        "cpt_token_ids",
        "cpt_tokens_type_mask",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    )
    harmless: ClassVar[tuple[str, ...]] = (
        "cpt_mask",
        "opt_loss_decay_factor",
        "opt_weighted_loss_type",
        "tokenizer_name_or_path",
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(CPT, handle.method)
        return {
            **super().settings(handle),
            "cpt_token_ids": list(method.ids),
            "cpt_mask": [1] * len(method.ids),
            "cpt_tokens_type_mask": list(method.roles or [1] * len(method.ids)),
            "opt_projection_epsilon": method.epsilon,
            "opt_projection_format_epsilon": method.format_epsilon,
        }

    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        return CPT(
            ids=tuple(config.get("cpt_token_ids") or ()),
            roles=tuple(config.get("cpt_tokens_type_mask") or ()),
            epsilon=config.get("opt_projection_epsilon", 0.1),
            format_epsilon=config.get("opt_projection_format_epsilon", 0.1),
        )

    def embeddings(self, adapter: Adapter) -> Tensor:
        return cast(CPTAdapter, adapter).prompt(Inputs({}))

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(CPTAdapter, adapter)
        with torch.no_grad():
            ours.start.copy_(given[EMBEDDINGS])
            ours.D.zero_()
