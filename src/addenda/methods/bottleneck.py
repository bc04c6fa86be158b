"""Bottleneck adapters: small non-linear layers beside or behind the frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer, number
from addenda.core.registry import register
from addenda.core.targets import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS, suffixes_present

__all__ = ["Bottleneck"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
_FEED_FORWARD_BLOCKS = ("mlp", "feed_forward", "ffn", "DenseReluDense")


@register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Method):
    """Add a small two-layer network with a non-linearity to what a sub-layer returns.

    houlsby, pfeiffer:  y = h + scaling * up(f(down(h))),  h = base(x)      behind the sub-layer
    parallel:           y = base(x) + scaling * up(f(down(x)))              beside it

    down: (size, d), up: (d, size), each with a bias. ``up`` starts at zero, so the adapted layer starts equal to its
    base. Not mergeable: a non-linearity has no weight.

    Args:
        size: width of the bottleneck, >= 1. Parameters: about 2 * d * size per adapted layer.
        placement: ``houlsby`` behind the attention's and the feed-forward's output layer, ``pfeiffer`` behind the
            feed-forward's alone, ``parallel`` beside the feed-forward block; in a model that has none of the names
            these go by, at all linear layers, and the plan says so.
        activation: ``relu``, ``gelu`` or ``silu``.
        scaling: factor of the added part, dimensionless, > 0. He et al. use 4 for the parallel placement.

    Differs from: the papers start ``up`` near zero, this at zero, so that the start is the base exactly. Pfeiffer
    et al. place theirs after the block's residual and norm in post-norm models; here it acts on the sub-layer's
    output before the residual, which is what pre-norm models need. No layer norm of its own is trained.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, Bottleneck(size=2), targets=["0"]).trainable_parameters
        22

    References: Houlsby et al. 2019, arXiv:1902.00751, section 2. Pfeiffer et al. 2020, arXiv:2005.00247, section 3.
    He et al. 2022, arXiv:2110.04366, section 3.
    """

    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {},
        {"placement": "pfeiffer", "activation": "relu"},
        {"placement": "parallel", "scaling": 4.0},
    )

    size: int = 32
    """Width of the bottleneck."""
    placement: str = "houlsby"
    """houlsby, pfeiffer or parallel."""
    activation: str = "gelu"
    """relu, gelu or silu."""
    scaling: float = 1.0
    """Factor of the added part."""

    def problems(self) -> list[str]:
        found = integer("size", self.size) + number("scaling", self.scaling, above=0.0)
        if self.placement not in _PLACEMENTS:
            found.append(f"placement must be one of {', '.join(_PLACEMENTS)}, got {self.placement!r}")
        if self.activation not in tuple(_ACTIVATIONS):
            found.append(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}")
        return found

    def layer_kinds(self) -> tuple[str, ...]:
        return (*self.kinds, "block") if self.placement == "parallel" else self.kinds

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        feed_forward = suffixes_present(paths, FEED_FORWARD_OUTPUTS, without=ATTENTION_OUTPUTS)
        roles = {
            "houlsby": suffixes_present(paths, ATTENTION_OUTPUTS) + feed_forward,
            "pfeiffer": feed_forward,
            "parallel": suffixes_present(paths, _FEED_FORWARD_BLOCKS),
        }
        return roles[self.placement] or "all-linear"

    def problems_at(self, base: Base) -> list[str]:
        if self.placement == "parallel" and base.channels_in is None:
            return ["its input holds indices, which a parallel bottleneck cannot read"]
        if self.placement == "parallel" and base.kind in ("conv", "transposed-conv"):
            return ["a parallel bottleneck does not follow a convolution's strides"]
        return []

    def build(self, base: Base) -> BottleneckAdapter:
        parallel = self.placement == "parallel"
        width_in = base.channels_in if parallel and base.channels_in else base.channels_out
        return BottleneckAdapter(
            down=base.parameter(self.size, width_in, init=_xavier_uniform),
            down_bias=base.parameter(self.size),
            up=base.parameter(base.channels_out, self.size),
            up_bias=base.parameter(base.channels_out),
            settings=self,
        )


def _xavier_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(tensor, generator=generator)


class BottleneckAdapter(Adapter):
    """down: (size, d), down_bias: (size,), up: (channels_out, size), up_bias: (channels_out,)."""

    def __init__(
        self,
        *,
        down: nn.Parameter,
        down_bias: nn.Parameter,
        up: nn.Parameter,
        up_bias: nn.Parameter,
        settings: Bottleneck,
    ) -> None:
        super().__init__()
        self.down, self.down_bias = down, down_bias
        self.up, self.up_bias = up, up_bias
        self.parallel = self.additive = settings.placement == "parallel"
        self.scaling = settings.scaling
        self.activation = settings.activation

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        read = base.inputs_last(x) if self.parallel else base.outputs_last(h)
        return h + base.outputs_back(self.scaling * self._network(read))

    def _network(self, x: Tensor) -> Tensor:
        inner = _ACTIVATIONS[self.activation](F.linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        return F.linear(inner, self.up.to(x.dtype), self.up_bias.to(x.dtype))
