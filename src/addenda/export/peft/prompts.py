"""What PEFT's forms of prompts and prefixes have in common: a tensor for the whole model, and the model's measures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.layers import view_of
from addenda.core.sequence import Transformer
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form

__all__ = ["EMBEDDINGS", "PrefixForm", "PromptForm"]

EMBEDDINGS = "prompt_embeddings"


class PromptForm(Form):
    """A form of embeddings in front of every sequence."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer",)
    names: ClassVar[tuple[str, ...]] = (EMBEDDINGS,)
    of_model = True
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "target_modules")
    measures: ClassVar[tuple[str, ...]] = (
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "token_dim",
    )
    """Keys of every form; what they say is held against the tensors and the model."""

    def settings(self, handle: Handle) -> dict[str, Any]:
        [(path, adapter)] = handle.adapters.items()
        layer = cast(Transformer, view_of(handle.model.get_submodule(path), path))
        return {
            "num_attention_heads": self.heads(layer)[0],
            "num_layers": layer.layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": len(self.tensors(adapter, layer)[EMBEDDINGS]),
            "token_dim": self.heads(layer)[1],
        }

    def heads(self, layer: Transformer) -> tuple[int, int]:
        """Return how many heads PEFT is told of, and the width of all of them."""
        return int(cast(Any, layer).module.config.num_attention_heads), layer.width

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        given = tensors.get(EMBEDDINGS)
        stated = config.get("num_virtual_tokens")
        problems = []
        if config.get("num_transformer_submodules") not in (None, 1):
            problems.append("it is for an encoder and a decoder")
        if given is None or given.dim() != 2 or stated != len(given):
            problems.append(f"its tensors are not the {stated} virtual tokens of its configuration")
        if problems:
            raise CheckpointError(
                f"the prompt cannot be read: {'; '.join(problems)}",
                hint="export it anew for a causal language model",
            )
        return self.read_method(config, tensors)

    @abstractmethod
    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        """Return the method that a configuration describes, whose tensors are as many as it says."""

    def problems(self, handle: Handle) -> list[str]:
        if hasattr(handle.model, "lm_head"):
            return []
        return [
            "PEFT has prompts for the whole of a task's model; only those of causal language models are written"
        ]

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.embeddings(adapter)}

    @abstractmethod
    def embeddings(self, adapter: Adapter) -> Tensor:
        """Return what stands in front: ``(tokens, token_dim)``, or ``(tokens, layers * 2 * token_dim)`` of a prefix."""


class PrefixForm(PromptForm):
    """A form of keys and values in front of every sequence."""

    def heads(self, layer: Transformer) -> tuple[int, int]:
        return layer.key_value_heads, layer.key_value_heads * layer.head_width

    def embeddings(self, adapter: Adapter) -> Tensor:
        states: Tensor = cast(Any, adapter).states()
        return states
