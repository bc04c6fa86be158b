"""ShadowPEFT: a small transformer beside the base, whose states steer the input of every block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import integer, number
from addenda.core.registry import register
from addenda.core.sequence import Inputs, SequenceMethod, Transformer, cut

__all__ = ["Shadow"]


@register("shadow")
@dataclass(frozen=True)
class Shadow(SequenceMethod):
    """A shadow that runs beside the base: each block reads how far the two are apart, and moves the shadow on.

    x_l = h_{l-1} + alpha * U_l D_l (h_{l-1} - s_{l-1}),   h_l = block_l(x_l),   s_l = (1 - g) s_{l-1} + g T_l(h_l)

    g = sigmoid(G_l(h_l));   T_l, G_l: two layers with a GELU between, (d, inner, d);   D_l: (rank, d),  U_l: (d, rank)

    s_0 is what a small transformer of the base's own make, the mirror, gives for the embeddings of the same tokens. U
    starts at zero, so the adapted model starts equal to its base; all else starts as transformers and PyTorch start
    such layers. Not mergeable: what is added depends on the tokens. Parameters, for n blocks: those of a base of
    ``layers`` blocks without its embedding, 2 * n * rank * d, and (n - 1) * (4 * inner * d + 2 * inner + 2 * d).

    Args:
        rank: inner dimension of what is injected, >= 1.
        layers: blocks of the mirror, >= 1.
        alpha: strength of what is injected, > 0.
        inner: width between the two layers of T and of G, >= 1; None means the rank.
        dropout: probability of zeroing a feature of the difference during training, in [0, 1).

    **Cost**: ``layers`` more blocks that are trained whole, each with all a block has; six thin products a block; and
    in generation as many more layers in the cache. The states travel beside the features, which doubles what is kept
    of a block that runs again in the backward.

    **Use it when** the parameters of a whole block are affordable and one place should decide for all layers.

    **Learning rate**: 1e-4, as a mirror is trained whole; not tuned.

    **Differs from**: the paper adds to the loss what the mirror alone, under the base's head, loses on the labels, so
    that it can be used without the base. No loss is known here, and the mirror is no model by itself. PEFT has T and G
    behind the last block too, where nothing reads the shadow.

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, Shadow(rank=2)).trainable_parameters
        2900

    References: Li et al. 2026, arXiv:2604.19254, section 3.
    """

    learning_rate: ClassVar[float] = 1e-4
    exceptions: ClassVar[Mapping[str, str]] = {}
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4, "dropout": 0.0},
        {"rank": 3, "layers": 2, "alpha": 0.5, "inner": 5, "dropout": 0.0},
    )

    rank: int = 8
    """Inner dimension of what is injected."""
    layers: int = 1
    """Blocks of the mirror."""
    alpha: float = 0.1
    """Strength of what is injected."""
    inner: int | None = None
    """Width between the two layers of T and of G; None means the rank."""
    dropout: float = 0.2
    """Probability of zeroing a feature of the difference during training."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + integer("layers", self.layers)
        found += [] if self.inner is None else integer("inner", self.inner)
        return (
            found
            + number("alpha", self.alpha, above=0.0)
            + number("dropout", self.dropout, least=0.0, below=1.0)
        )

    def build_on(self, model: Transformer) -> ShadowAdapter:
        n, d, inner = model.layers, model.width, self.inner or self.rank
        adapter = ShadowAdapter(model.mirror(self.layers), alpha=self.alpha, dropout=self.dropout)
        adapter.hold(
            down=model.parameter(n, self.rank, d, init=_as_linear(d)), up=model.parameter(n, d, self.rank)
        )
        for name in ("transform", "gate"):
            weights = {
                f"{name}_in": model.parameter(n - 1, inner, d, init=_as_linear(d)),
                f"{name}_in_bias": model.parameter(n - 1, inner, init=_as_linear(d)),
                f"{name}_out": model.parameter(n - 1, d, inner, init=_as_linear(inner)),
                f"{name}_out_bias": model.parameter(n - 1, d, init=_as_linear(inner)),
            }
            adapter.hold(**weights)
        return adapter


def _as_linear(columns: int) -> Any:
    bound = 1 / math.sqrt(columns)
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


class ShadowAdapter(Adapter):
    """mirror: a transformer; down: (n, rank, d), up: (n, d, rank); of transform and gate, all (n - 1, ...), ``in``:
    (inner, d), ``in_bias``: (inner,), ``out``: (d, inner) and ``out_bias``: (d,)."""

    down: Tensor
    up: Tensor

    def __init__(self, mirror: nn.Module, *, alpha: float, dropout: float) -> None:
        super().__init__()
        self.mirror, self.alpha, self.dropout = mirror, alpha, dropout

    def forward(self, x: Inputs, base: Base) -> Any:  # type: ignore[override]
        model = cast(Transformer, base)
        inputs, state = model.mirrored(self.mirror, x)
        with model.along(state, self.inject, self.update):
            output = model(inputs)
        return cut(output, lambda states: states[..., : state.shape[-1]])

    def inject(self, block: int, hidden: Tensor, state: Tensor) -> Tensor:
        """Return what a block reads instead of ``hidden``; all (B, T, d)."""
        apart = F.dropout(hidden - state, self.dropout, self.training)
        down, up = self.down[block].to(hidden.dtype), self.up[block].to(hidden.dtype)
        return hidden + self.alpha * F.linear(F.linear(apart, down), up)

    def update(self, block: int, hidden: Tensor, state: Tensor) -> Tensor:
        """Return the state behind a block that gave ``hidden``; all (B, T, d)."""
        return torch.lerp(
            state, self._layers("transform", block, hidden), self._layers("gate", block, hidden).sigmoid()
        )

    def _layers(self, name: str, block: int, hidden: Tensor) -> Tensor:
        first, first_bias, second, second_bias = (
            self.get_parameter(f"{name}_{part}")[block].to(hidden.dtype)
            for part in ("in", "in_bias", "out", "out_bias")
        )
        return F.linear(F.gelu(F.linear(hidden, first, first_bias)), second, second_bias)
