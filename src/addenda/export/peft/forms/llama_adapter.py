"""LLaMA-Adapter in PEFT's folder: ``adaption_prompt`` (1, tokens, width) and ``adaption_gate`` (1,) of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.targets import adaptable
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.methods.llama_adapter import LlamaAdapter, LlamaAdapterAdapter

__all__ = ["LlamaAdapterForm"]

_NAME = "self_attn"
_MODELS = ("llama", "mistral")
"""Of PEFT's models those whose adapters compute what ours do; GPT-2's leave out the output projection."""


@form
class LlamaAdapterForm(Form):
    """PEFT's ``AdaptionPromptConfig``."""

    peft_type = "ADAPTION_PROMPT"
    method = LlamaAdapter
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    literal_targets = True
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "modules_to_save")
    reads: ClassVar[tuple[str, ...]] = ("adapter_layers", "adapter_len")
    names: ClassVar[tuple[str, ...]] = ("adaption_gate", "adaption_prompt")

    def settings(self, handle: Handle) -> dict[str, Any]:
        tokens = cast(LlamaAdapter, handle.method).tokens
        return {"adapter_layers": len(handle.paths), "adapter_len": tokens, "target_modules": _NAME}

    def problems(self, handle: Handle) -> list[str]:
        every = [path for path, (_, kind) in adaptable(handle.model).items() if kind.among(self.kinds)]
        config: Any = getattr(handle.model, "config", None)
        found = []
        if every[-len(handle.paths) :] != handle.paths:
            found.append("PEFT has adaption prompts for the last layers only, without a gap")
        if getattr(config, "model_type", None) not in _MODELS:
            found.append(f"PEFT has adaption prompts for these models only: {', '.join(_MODELS)}")
        return found

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        layers, tokens = config.get("adapter_layers"), config.get("adapter_len")
        if not isinstance(tokens, int) or layers != len(paths):
            raise CheckpointError(
                f"adapter_layers = {layers!r} and adapter_len = {tokens!r} do not fit tensors for {len(paths)} layers",
                hint="export it anew",
            )
        return LlamaAdapter(tokens=tokens, layers=len(paths))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(LlamaAdapterAdapter, adapter)
        return {"adaption_gate": ours.gate, "adaption_prompt": ours.P[None]}
