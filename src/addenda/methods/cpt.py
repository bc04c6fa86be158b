"""CPT: a context's embeddings, moved a little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import number
from addenda.core.registry import register
from addenda.core.sequence import Inputs, PromptAdapter, SequenceMethod, Transformer
from addenda.core.virtual_starts import start_problems, tokens_of_vocabulary, unknown_tokens

__all__ = ["CPT"]


@register("cpt")
@dataclass(frozen=True)
class CPT(SequenceMethod):
    """Context-aware prompt tuning: examples stand in front of every sequence, and their embeddings may move a little.

    h = model([embed(ids) + D; embed(x)]),   D: (tokens, width),   ||D_i|| <= epsilon_i sqrt(width / 2048)

    D starts at zero, so the model starts as it would be with the examples in its context. After each update every row
    that has left its ball is put back onto it. The labels of the examples do not move. Not mergeable. Parameters:
    tokens * width.

    Args:
        ids: the tokens of the context.
        text: the context as a text; where a run has a tokenizer, it makes ``ids`` of it.
        roles: what each token of the context is, by its remainder when divided by 4: 1 the format around an input, 2
            an input, 3 the format around a label, 0 a label. Empty means that all are format.
        epsilon: how far an input's embedding may move, > 0.
        format_epsilon: how far that of a token of the format may move, > 0.

    **Cost**: no matrix product beside the model's own; every sample is longer by the context.

    **Use it when** there are so few examples that they fit the context, and learning from them alone would overfit.

    **Learning rate**: 1e-3, chosen here for AdamW and not tuned; the balls are small, and a higher rate jumps between
    points of their surface.

    Differs from: the paper also trains on the labels within the context, later ones counting more; here the loss is
    that of the run's own rows. Nothing else of the loss is changed.

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, CPT(ids=(4, 5, 6))).trainable_parameters
        48

    References: Blau et al. 2024, arXiv:2410.17222, section 3.
    """

    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"ids": (3, 1, 4, 1, 5)},
        {"ids": (9, 2, 6), "roles": (1, 2, 4), "epsilon": 2.0, "format_epsilon": 1.0},
    )

    ids: tuple[int, ...] = ()
    """Tokens of the context."""
    text: str = ""
    """The context as a text."""
    roles: tuple[int, ...] = ()
    """What each token of the context is."""
    epsilon: float = 0.1
    """How far an input's embedding may move."""
    format_epsilon: float = 0.1
    """How far that of a token of the format may move."""

    def problems(self) -> list[str]:
        found = start_problems("text", self.ids, self.text) + number("epsilon", self.epsilon, above=0.0)
        found += number("format_epsilon", self.format_epsilon, above=0.0)
        if self.roles and self.ids and len(self.roles) != len(self.ids):
            found.append(
                f"roles must be as many as the context's {len(self.ids)} tokens, got {len(self.roles)}"
            )
        if not all(isinstance(role, int) and role >= 0 for role in self.roles):
            found.append(f"roles must be a list of whole numbers >= 0, got {self.roles!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        if not self.ids:
            return ["it asks for the tokens of a context: set text in a recipe, or give ids"]
        return unknown_tokens(self.ids, base)

    @property
    def positions(self) -> int:
        return len(self.ids)

    def build_on(self, model: Transformer) -> CPTAdapter:
        start = model.constant(len(self.ids), model.width, init=tokens_of_vocabulary(model, self.ids))
        return CPTAdapter(start, model.parameter(*start.shape), self.radii(model.width))

    def radii(self, width: int) -> Tensor:
        """Return how far each token may move, ``(tokens,)``."""
        reach = {1: self.format_epsilon, 2: self.epsilon, 3: self.format_epsilon}
        roles = self.roles or (1,) * len(self.ids)
        return torch.tensor([reach.get(role % 4, 0.0) for role in roles]) * math.sqrt(width / 2048)

    def after_update(self, adapters: Mapping[str, Adapter], *, step: int, of_steps: int) -> None:
        for adapter in adapters.values():
            cast(CPTAdapter, adapter).put_back()


class CPTAdapter(PromptAdapter):
    """start: (tokens, width), not trained; D: the same; radii: (tokens,)."""

    start: Tensor
    radii: Tensor

    def __init__(self, start: Tensor, D: nn.Parameter, radii: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("radii", radii.to(D), persistent=False)
        self.D = D

    def put_back(self) -> None:
        """Put every row of D that is longer than its radius back onto its ball."""
        norms = self.D.norm(dim=1)
        shrink = torch.where(norms > self.radii, self.radii / norms.clamp(min=1e-12), 1.0)
        self.D.mul_(shrink[:, None])

    def prompt(self, inputs: Inputs) -> Tensor:
        return self.start + self.D * (self.radii > 0)[:, None]
