"""LLaMA-Adapter: in the upper layers, attention also reads a few trained states, through a gate that starts closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.sequence import Attention, Inputs

__all__ = ["LlamaAdapter"]


@register("llama-adapter")
@dataclass(frozen=True)
class LlamaAdapter(Method):
    """Zero-gated attention to trained prompts, beside the frozen attention of the upper layers.

    y = attention(x) + g W_o softmax(scaling q(x) (W_k P)^T) (W_v P),   P: (tokens, width),  g: a number, in each layer

    q(x) are the layer's own queries with their positions; W_k, W_v and W_o are its own projections, and P stands at no
    position. g starts at zero, so the adapted layer starts equal to its base. Not mergeable. Parameters:
    tokens * width + 1 per layer.

    Args:
        tokens: prompts of each layer, >= 1.
        layers: how many of the last layers get them where no targets are named, >= 1; fewer if the model has fewer.

    **Cost**: the queries are projected twice, and 4 * tokens * heads * head_width FLOP per token and layer are spent
    on reading the prompts. The context grows by nothing.

    **Use it when** the start must be the base and nothing may be merged: with the gate closed nothing is lost.

    **Learning rate**: 3e-3, chosen here for AdamW and not tuned.

    Differs from: the official code has a gate for each head, the paper and PEFT one for each layer, as here. It stands
    on attention with projections called q_proj, k_proj, v_proj and o_proj whose rotary positions turn halves of a
    head, as Llama and most of its kin have.

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, LlamaAdapter(tokens=4, layers=1)).trainable_parameters
        65

    References: Zhang et al. 2023, arXiv:2303.16199, section 3.
    """

    learning_rate: ClassVar[float] = 3e-3
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"tokens": 5, "layers": 1}, {"tokens": 3})

    tokens: int = 10
    """Prompts of each layer."""
    layers: int = 30
    """How many of the last layers get them."""

    def problems(self) -> list[str]:
        return integer("tokens", self.tokens) + integer("layers", self.layers)

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return list(paths[-self.layers :])

    def build(self, base: Base) -> LlamaAdapterAdapter:
        width = cast(Attention, base).width
        return LlamaAdapterAdapter(base.parameter(self.tokens, width, init=_normal), base.parameter(1))


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


class LlamaAdapterAdapter(Adapter):
    """P: (tokens, width), gate: (1,)."""

    additive = True

    def __init__(self, P: nn.Parameter, gate: nn.Parameter) -> None:
        super().__init__()
        self.P, self.gate = P, gate

    def forward(self, x: Inputs, base: Base) -> Any:  # type: ignore[override]
        attention = cast(Attention, base)
        out, *others = attention(x)
        queries = attention.queries(x)
        keys, values = attention.keys_and_values(self.P.to(queries.dtype))
        scores = queries @ keys.transpose(1, 2) * attention.scaling
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        read = (self.gate * weights).to(values.dtype) @ values
        return out + attention.finish(read), *others
