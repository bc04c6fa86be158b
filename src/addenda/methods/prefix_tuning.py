"""Prefix tuning: trained keys and values in front of every sequence, in every attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Base
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.sequence import PrefixAdapter, SequenceMethod, Transformer
from addenda.core.virtual_starts import (
    start_problems,
    start_problems_at,
    states_of_tokens,
    tokens_of_vocabulary,
    uniform,
)

__all__ = ["PrefixTuning"]


@register("prefix-tuning")
@dataclass(frozen=True)
class PrefixTuning(SequenceMethod):
    """In every attention layer the keys and values of virtual tokens stand before those of the sequence.

    attention(q, [K_l; k], [V_l; v]),   K_l, V_l: (heads, tokens, head_width)   in layer l

    They are trained as they are, or made of one embedding for each virtual token by a network with one hidden layer:

    [K; V] = W2 tanh(W1 E),   E: (tokens, width),  W1: (projection, width),  W2: (2 layers heads head_width, projection)

    K is what attention reads: positions are applied already, and no norm of keys follows. The positions of the real
    tokens begin at ``tokens``. Not mergeable. Parameters: 2 * layers * heads * head_width * tokens without projection,
    with the heads of keys and values.

    Args:
        tokens: virtual tokens, >= 1. Each costs as much context as a token of the text.
        projection: width of the network's hidden layer, or 0 for none.
        start: ``vocabulary`` starts from the keys and values of different tokens drawn at random, read as one text,
            ``text`` from those of ``ids``, ``random`` from numbers between -0.5 and 0.5. With a projection, E starts
            from the embeddings of the same tokens.
        text: a text to start from; where a run has a tokenizer, it makes ``ids`` of it.
        ids: the tokens of that text, repeated or cut to ``tokens``.

    **Cost**: only attention sees more positions; the feed-forward blocks do not, so it is cheaper than a prompt of as
    many tokens.

    **Use it when** the base's weights must not be touched at all, and a prompt is too weak. For packed rows attention
    runs in its plain form.

    **Learning rate**: 1e-2 for keys and values as they are, chosen here for AdamW and not tuned. With a projection
    take 1e-3.

    Differs from: the paper trains through a projection always, because keys and values drawn at random train badly;
    started from those of real tokens they train without. PEFT draws them from N(0, 1).

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, PrefixTuning(tokens=4)).trainable_parameters
        256

    References: Li and Liang 2021, arXiv:2101.00190, section 4.
    """

    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"tokens": 5},
        {"tokens": 3, "start": "text", "ids": (3, 1)},
        {"tokens": 4, "start": "random", "projection": 6},
    )

    tokens: int = 20
    """Virtual tokens."""
    projection: int = 0
    """Width of the network that makes keys and values; 0 for none."""
    start: str = "vocabulary"
    """vocabulary, text or random."""
    text: str = ""
    """Text to start from."""
    ids: tuple[int, ...] = ()
    """Tokens of the text to start from."""

    def problems(self) -> list[str]:
        found = integer("tokens", self.tokens) + integer("projection", self.projection, least=0)
        return found + start_problems(self.start, self.ids, self.text)

    def problems_at(self, base: Base) -> list[str]:
        return start_problems_at(self.start, self.ids, base)

    def build_on(self, model: Transformer) -> PrefixTuningAdapter:
        ids = self.ids if self.start == "text" else ()
        random, shape = uniform(0.5), model.states
        if not self.projection:
            init = random if self.start == "random" else states_of_tokens(model, ids)
            return PrefixTuningAdapter(shape, model.parameter(self.tokens, shape.numel(), init=init))
        init = random if self.start == "random" else tokens_of_vocabulary(model, ids)
        E = model.parameter(self.tokens, model.width, init=init)
        W1 = model.parameter(self.projection, model.width, init=uniform(model.width**-0.5))
        W2 = model.parameter(shape.numel(), self.projection, init=uniform(self.projection**-0.5))
        layers = [W1, model.parameter(len(W1)), W2, model.parameter(len(W2))]
        return PrefixTuningAdapter(shape, E, layers)


class PrefixTuningAdapter(PrefixAdapter):
    """E: (tokens, layers * 2 * heads * head_width) as it is, or (tokens, width) with the layers that follow."""

    def __init__(self, shape: torch.Size, E: nn.Parameter, layers: list[nn.Parameter] | None = None) -> None:
        super().__init__()
        self.shape, self.E = shape, E
        self.layers = nn.ParameterList(layers or [])

    def states(self) -> Tensor:
        """Return the keys and values, ``(tokens, layers * 2 * heads * head_width)``."""
        if not len(self.layers):
            return self.E
        W1, b1, W2, b2 = self.layers
        return F.linear(torch.tanh(F.linear(self.E, W1, b1)), W2, b2)

    def prefix(self) -> Tensor:
        return self.states().reshape(-1, *self.shape).movedim(0, 3)
