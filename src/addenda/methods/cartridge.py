"""Cartridges: a text's keys and values, trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Base
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.sequence import PrefixAdapter, SequenceMethod, Transformer
from addenda.core.virtual_starts import start_problems, start_problems_at, states_of_tokens, uniform

__all__ = ["Cartridge"]


@register("cartridge")
@dataclass(frozen=True)
class Cartridge(SequenceMethod):
    """The keys and values of a text stand before those of every sequence, and all but the first tokens' are trained.

    attention(q, [K_l; k], [V_l; v]),   K_l, V_l: (heads, tokens, head_width)   in layer l

    Prefix tuning with another start and another aim: a long text is to be known by a cache much smaller than its own.
    The keys and values are those that the model has for the text's first ``tokens`` tokens; the first ``frozen`` of
    them stay, because models use their first token as a place to attend to nothing. Not mergeable. Parameters:
    2 * layers * heads * head_width * (tokens - frozen), with the heads of keys and values.

    Args:
        tokens: virtual tokens, > frozen. Each costs as much context as a token of the text.
        frozen: how many of the first are not trained, >= 0.
        start: ``text`` starts from the first tokens of ``ids``, ``vocabulary`` from different tokens drawn at random,
            ``random`` from numbers between -0.5 and 0.5.
        text: the text; where a run has a tokenizer, it makes ``ids`` of it.
        ids: the text's tokens, repeated or cut to ``tokens``.

    **Cost**: only attention sees more positions; the feed-forward blocks do not.

    **Use it when** many questions are asked of one long text.

    **Learning rate**: 1e-2, chosen here for AdamW and not tuned.

    Differs from: what the paper trains on (conversations about the text that the model makes up itself, and the
    answers it gives with the whole text before it as targets) is the data's matter; here the loss is that of the run.

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, Cartridge(tokens=4, ids=(5, 6, 7, 8))).trainable_parameters
        192

    References: Eyuboglu et al. 2025, arXiv:2506.06266, section 3.
    """

    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"tokens": 4, "ids": (3, 1, 4, 1, 5)},
        {"tokens": 3, "start": "vocabulary", "frozen": 0},
    )

    tokens: int = 128
    """Virtual tokens."""
    frozen: int = 1
    """How many of the first are not trained."""
    start: str = "text"
    """text, vocabulary or random."""
    text: str = ""
    """The text."""
    ids: tuple[int, ...] = ()
    """The text's tokens."""

    def problems(self) -> list[str]:
        found = integer("tokens", self.tokens) + integer("frozen", self.frozen, least=0)
        if not found and self.frozen >= self.tokens:
            found.append(f"frozen must be less than tokens = {self.tokens}, got {self.frozen}")
        return found + start_problems(self.start, self.ids, self.text)

    def problems_at(self, base: Base) -> list[str]:
        return start_problems_at(self.start, self.ids, base)

    def build_on(self, model: Transformer) -> CartridgeAdapter:
        ids = self.ids if self.start == "text" else ()
        init = uniform(0.5) if self.start == "random" else states_of_tokens(model, ids)
        whole = model.constant(self.tokens, model.states.numel(), init=init)
        return CartridgeAdapter(model.states, whole[: self.frozen].clone(), whole[self.frozen :].clone())


class CartridgeAdapter(PrefixAdapter):
    """first: (frozen, layers * 2 * heads * head_width), not trained; others: (tokens - frozen, the same)."""

    first: Tensor

    def __init__(self, shape: torch.Size, first: Tensor, others: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("first", first)
        self.others = nn.Parameter(others)

    def states(self) -> Tensor:
        """Return the keys and values, ``(tokens, layers * 2 * heads * head_width)``."""
        return torch.cat([self.first, self.others])

    def prefix(self) -> Tensor:
        return self.states().reshape(-1, *self.shape).movedim(0, 3)
