"""Prompt tuning: trained embeddings in front of every sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.contract import Base
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.sequence import Inputs, PromptAdapter, SequenceMethod, Transformer
from addenda.core.virtual_starts import start_problems, start_problems_at, tokens_of_vocabulary, uniform

__all__ = ["PromptTuning"]


@register("prompt-tuning")
@dataclass(frozen=True)
class PromptTuning(SequenceMethod):
    """Embeddings of virtual tokens in front of every sequence, and nothing else, are trained.

    h = model([P; embed(x)]),   P: (tokens, width)

    Not mergeable: there is no weight that it changes. Parameters: tokens * width.

    Args:
        tokens: virtual tokens, >= 1. Each costs as much context and time as a token of the text.
        start: ``vocabulary`` starts from the embeddings of different tokens drawn at random, ``text`` from those of
            ``ids``, ``random`` from numbers between -0.5 and 0.5.
        text: a text to start from; where a run has a tokenizer, it makes ``ids`` of it.
        ids: the tokens of that text, repeated or cut to ``tokens``.

    **Cost**: no matrix product beside the model's own; every sample is longer by ``tokens``.

    **Use it when** the adapter must be tiny, or several must be served in one batch: a prompt is data, not a weight.
    On small models it learns slowly and ends below LoRA.

    **Learning rate**: 3e-2, chosen for AdamW and not tuned; the paper's 0.3 is for Adafactor, and with a rate that
    suits LoRA a prompt hardly moves.

    Differs from: the paper starts from the 5,000 most frequent tokens; a vocabulary's order is not by frequency in
    every tokenizer, so this draws from all of it. PEFT starts from N(0, 1) by default.

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, PromptTuning(tokens=4)).trainable_parameters
        64

    References: Lester et al. 2021, arXiv:2104.08691, section 2.
    """

    learning_rate: ClassVar[float] = 3e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"tokens": 5},
        {"tokens": 3, "start": "random"},
        {"tokens": 4, "start": "text", "ids": (3, 1, 2)},
    )

    tokens: int = 20
    """Virtual tokens."""
    start: str = "vocabulary"
    """vocabulary, text or random."""
    text: str = ""
    """Text to start from."""
    ids: tuple[int, ...] = ()
    """Tokens of the text to start from."""

    def problems(self) -> list[str]:
        return integer("tokens", self.tokens) + start_problems(self.start, self.ids, self.text)

    def problems_at(self, base: Base) -> list[str]:
        return start_problems_at(self.start, self.ids, base)

    def build_on(self, model: Transformer) -> PromptTuningAdapter:
        ids = self.ids if self.start == "text" else ()
        init = uniform(0.5) if self.start == "random" else tokens_of_vocabulary(model, ids)
        return PromptTuningAdapter(model.parameter(self.tokens, model.width, init=init))


class PromptTuningAdapter(PromptAdapter):
    """P: (tokens, width)."""

    def __init__(self, P: nn.Parameter) -> None:
        super().__init__()
        self.P = P

    def prompt(self, inputs: Inputs) -> Tensor:
        return self.P
