"""P-tuning in PEFT's folder: what the network answers, ``prompt_embeddings`` (tokens, width), without the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Method
from addenda.core.handle import Handle
from addenda.core.sequence import Inputs, PromptAdapter
from addenda.export.peft.form import form
from addenda.export.peft.prompts import EMBEDDINGS, PromptForm
from addenda.methods.p_tuning import PTuning
from addenda.methods.prompt_tuning import PromptTuning, PromptTuningAdapter

__all__ = ["PTuningForm"]


@form
class PTuningForm(PromptForm):
    """PEFT's ``PromptEncoderConfig``; read as a prompt without a network."""

    peft_type = "P_TUNING"
    method = PTuning
    reads: ClassVar[tuple[str, ...]] = PromptForm.measures
    harmless: ClassVar[tuple[str, ...]] = (
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(PTuning, handle.method)
        shape = super().settings(handle)
        return {
            **shape,
            "encoder_hidden_size": method.hidden or shape["token_dim"],
            "encoder_reparameterization_type": method.encoder.upper(),
        }

    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        return PromptTuning(tokens=len(tensors[EMBEDDINGS]))

    def embeddings(self, adapter: Adapter) -> Tensor:
        if isinstance(adapter, PromptTuningAdapter):
            return adapter.P
        return cast(PromptAdapter, adapter).prompt(Inputs({}))
