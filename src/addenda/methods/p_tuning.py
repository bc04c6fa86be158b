"""P-tuning: embeddings in front of every sequence that a small network makes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.sequence import Inputs, PromptAdapter, SequenceMethod, Transformer
from addenda.core.virtual_starts import tokens_of_vocabulary, uniform

__all__ = ["PTuning"]

_ENCODERS = ("lstm", "mlp")


@register("p-tuning")
@dataclass(frozen=True)
class PTuning(SequenceMethod):
    """Virtual tokens in front of every sequence whose embeddings a network makes of trained ones.

    h = model([encoder(E); embed(x)]),   E: (tokens, width)

    mlp:   encoder(E) = W3 relu(W2 relu(W1 E)),     W1: (hidden, width),  W2: (hidden, hidden),  W3: (width, hidden)
    lstm:  encoder(E) = W2 relu(W1 biLSTM(E)),      W1: (2 hidden, 2 hidden),  W2: (width, 2 hidden)

    each W with a bias, the LSTM ``hidden`` wide in each direction. The network ties the virtual tokens together, which
    makes them easier to train than embeddings on their own; once trained, only what it answers is needed. Not
    mergeable. Parameters: tokens * width and those of the network.

    Args:
        tokens: virtual tokens, >= 1.
        encoder: ``mlp`` or ``lstm``.
        hidden: width of the network, >= 1; None means the model's.

    **Cost**: the network runs once in each step, over ``tokens`` rows; every sample is longer by ``tokens``.

    **Use it when** prompt tuning does not get going. In what it serves it is a prompt like any other.

    **Learning rate**: 1e-3, chosen here for AdamW and not tuned.

    Differs from: the paper mixes virtual tokens with the words of a template; here they all stand in front, as in
    PEFT. E starts from tokens of the vocabulary, where PEFT draws it from N(0, 1).

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, PTuning(tokens=4, hidden=8)).trainable_parameters
        416

    References: Liu et al. 2021, arXiv:2103.10385, section 2.
    """

    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"tokens": 4, "hidden": 12},
        {"tokens": 3, "encoder": "lstm", "hidden": 6},
    )

    tokens: int = 20
    """Virtual tokens."""
    encoder: str = "mlp"
    """mlp or lstm."""
    hidden: int | None = None
    """Width of the network; None means the model's."""

    def problems(self) -> list[str]:
        found = integer("tokens", self.tokens)
        if self.hidden is not None:
            found += integer("hidden", self.hidden)
        if self.encoder not in _ENCODERS:
            found.append(f"encoder must be one of {', '.join(_ENCODERS)}, got {self.encoder!r}")
        return found

    def build_on(self, model: Transformer) -> PTuningAdapter:
        hidden, width = self.hidden or model.width, model.width
        E = model.parameter(self.tokens, width, init=tokens_of_vocabulary(model, ()))
        if self.encoder == "mlp":
            return PTuningAdapter(E, _layers(model, [width, hidden, hidden, width]))
        gates = 4 * hidden
        shapes = [(gates, width), (gates, hidden), (gates,), (gates,)] * 2
        lstm = [model.parameter(*shape, init=uniform(hidden**-0.5)) for shape in shapes]
        return PTuningAdapter(E, _layers(model, [2 * hidden, 2 * hidden, width]), lstm)


def _layers(model: Transformer, widths: Sequence[int]) -> list[nn.Parameter]:
    """Weight and bias in turn, of layers from each width to the next."""
    made = []
    for d_in, d_out in itertools.pairwise(widths):
        made += [model.parameter(d_out, d_in, init=uniform(d_in**-0.5)), model.parameter(d_out)]
    return made


class PTuningAdapter(PromptAdapter):
    """E: (tokens, width), the layers' weights and biases in turn, and the weights of the LSTM if there is one."""

    def __init__(
        self, E: nn.Parameter, layers: list[nn.Parameter], lstm: Sequence[nn.Parameter] = ()
    ) -> None:
        super().__init__()
        self.E = E
        self.layers = nn.ParameterList(layers)
        self.lstm = nn.ParameterList(lstm)

    def prompt(self, inputs: Inputs) -> Tensor:
        x: Tensor = self.E
        if len(self.lstm):
            hidden = self.lstm[1].shape[1]
            start = x.new_zeros(2, 1, hidden)
            # Named as training, which is without dropout the same: cuDNN would keep nothing for the gradients else.
            x = torch.lstm(x[None], (start, start), list(self.lstm), True, 1, 0.0, True, True, True)[0][0]
        weights = list(self.layers)
        for place in range(0, len(weights), 2):
            x = F.linear(F.relu(x) if place else x, weights[place], weights[place + 1])
        return x
