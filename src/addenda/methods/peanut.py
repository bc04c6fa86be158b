"""PEANuT: a small network that makes the update of a weight from the weight itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import integer, number
from addenda.core.registry import register

__all__ = ["PEANuT"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


@register("peanut")
@dataclass(frozen=True)
class PEANuT(Method):
    """Update that a small network computes from the frozen weight: the same network reads each of its columns.

    y = base(x) + scaling * B (H x),   H: (rank, d_in), column by column of W:   h = f(A w)
    then, `depth` times, h = f(E_i h), and as often, h = f(D_i h) + what h was before the matching E

    A: (rank, d_out),  B: (d_out, rank),  E_i, D_i: (rank, rank). All but B start Kaiming-uniform and B at zero, so the
    adapted layer starts equal to its base. The update is a matrix of the given rank that is not linear in the
    parameters; it is mergeable exactly. Parameters: 2 * rank * d_out + 2 * depth * rank * rank per layer.

    Args:
        rank: width of the network, >= 1.
        depth: hidden layers on each side, >= 0.
        activation: ``relu``, ``gelu``, ``silu``, ``tanh``, ``sigmoid`` or ``leaky_relu``.
        scaling: factor of the update, dimensionless, > 0.

    **Cost**: that of LoRA of the same rank, and in every call 2 * rank * d_in * (d_out + 2 * depth * rank) FLOP to
    read the weight, whatever the number of rows: little in a large batch, as much as the layer itself for `rank` rows.
    A packed weight is unpacked for it.

    **Use it when** layers are wide at the input, as the parameters do not grow with d_in, or when LoRA's best rank is
    still short; merge it before answering token by token.

    **Learning rate**: 1e-3, as for LoRA. Not tuned.

    **Differs from**: PEFT leaves the choice of activations to transformers; these six are its common ones.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, PEANuT(rank=2, depth=1), targets=["0"]).trainable_parameters
        24

    References: Zhong et al. 2024, arXiv:2410.01870, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 6, "activation": "tanh"},
        {"rank": 4, "depth": 2, "activation": "gelu", "scaling": 0.5},
    )

    rank: int = 32
    """Width of the network."""
    depth: int = 0
    """Hidden layers on each side."""
    activation: str = "relu"
    """The network's non-linearity."""
    scaling: float = 1.0
    """Factor of the update."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + integer("depth", self.depth, least=0)
        found += number("scaling", self.scaling, above=0.0)
        if self.activation not in tuple(_ACTIVATIONS):
            found.append(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}")
        return found

    def build(self, base: Base) -> PEANuTAdapter:
        hidden = [base.parameter(self.rank, self.rank, init=kaiming_uniform) for _ in range(2 * self.depth)]
        return PEANuTAdapter(
            base.parameter(self.rank, base.d_out, init=kaiming_uniform),
            base.parameter(base.d_out, self.rank),
            hidden[: self.depth],
            hidden[self.depth :],
            self,
        )


class PEANuTAdapter(Adapter):
    """A: (rank, d_out), B: (d_out, rank), encoders and decoders: depth times (rank, rank)."""

    additive = reads_weight = True

    def __init__(
        self,
        A: nn.Parameter,
        B: nn.Parameter,
        encoders: list[nn.Parameter],
        decoders: list[nn.Parameter],
        settings: PEANuT,
    ) -> None:
        super().__init__()
        self.A, self.B = A, B
        self.encoders, self.decoders = nn.ParameterList(encoders), nn.ParameterList(decoders)
        self.activation, self.scaling = settings.activation, settings.scaling

    def _read(self, weight: Tensor) -> Tensor:
        """weight: (d_out, d_in) -> H: (rank, d_in)."""
        f = _ACTIVATIONS[self.activation]
        h = f(self.A.to(weight.dtype) @ weight)
        before = []
        for encoder in self.encoders:
            before.append(h)
            h = f(encoder.to(weight.dtype) @ h)
        for decoder in self.decoders:
            h = f(decoder.to(weight.dtype) @ h) + before.pop()
        return h

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.add_low_rank(x, self._read(base.weight().to(self.A.dtype)), self.B, self.scaling)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * (self.B.to(weight.dtype) @ self._read(weight)), bias
