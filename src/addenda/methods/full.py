"""Full training of named layers, beside a base that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from addenda.core.contract import Base, Method
from addenda.core.ranges import flag
from addenda.core.registry import register
from addenda.core.whole import WHOLE_KINDS, WholeAdapter, whole_adapter

__all__ = ["Full"]

_HEADS = ("lm_head", "embed_out", "output_projection", "classifier", "score")


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Train every number of the named layers, as a change beside the frozen weight.

    y = f(x; W + D, b + c),   D: as W,  c: as b

    f is the layer's own operation. D and c start at zero, so the adapted layer starts equal to its base. Mergeable
    exactly into an unquantized weight. Parameters: all of the layer's, d_in * d_out + d_out.

    Args:
        biases: change the biases too, where a layer has them.

    Cost: the sum W + D is formed in each forward and backward, but for embeddings, whose rows are added after they
    are looked up; gradient and optimizer state are as large as the layer.

    Use it when: a head or an embedding has to be learnt anew and the layers below are left alone. To train one along
    with another method, set that method's ``whole``: ``LoRA(whole=("lm_head",))``.

    Learning rate: 1e-4 is a usual one for training all weights of a head with AdamW; it is not tuned here.

    Differs from: training in place, by which the base would change. Weight decay pulls the change towards zero, that
    is the weight towards its base. Where a weight is tied to another layer's, the change is this layer's alone.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
        >>> addenda.attach(model, Full(), targets=["1"]).trainable_parameters
        15
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    kinds: ClassVar[tuple[str, ...]] = WHOLE_KINDS
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({}, {"biases": False})

    biases: bool = True
    """Change the biases too."""

    def problems(self) -> list[str]:
        return flag("biases", self.biases)

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return [path for path in paths if path.rpartition(".")[2] in _HEADS] or "all-linear"

    def build(self, base: Base) -> WholeAdapter:
        return whole_adapter(base, with_bias=self.biases)
