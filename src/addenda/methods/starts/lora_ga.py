"""LoRA-GA: the first step of the factors follows the gradient of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.decomposition import leading_svd
from addenda.core.observations import Observer
from addenda.core.ranges import number
from addenda.core.starts import Start, start

__all__ = ["LoRAGA"]

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "gradient", "unit")


@start("lora_ga")
@dataclass(frozen=True)
class LoRAGA(Start):
    """Singular vectors of the gradient of the loss with respect to the weight: G = U S V^T.

    A0 = c V_I^T,   B0 = c U_J,   I = 1..r,   J = r+1..2r,   c = d_out^(1/4) / sqrt(gamma)

    The two sets of indices are disjoint, so that the first step of gradient descent on both factors changes B A by the
    best approximation of rank 2r of the step that full training would take. 2 * rank must not exceed min(d_in, d_out).

    Args:
        direction: which of the first 2r vectors are A's and which B's: ``ArB2r`` as above, ``A2rBr`` the other way
            round, ``ArBr`` every other one (A the second, B the first of each pair), ``random``: r drawn ones for both.
        scale: ``stable`` as above; ``gradient``: A0 = V_I^T and B0 = c U_J S_J; ``unit``: A0 = V_I^T and B0 = U_J.
        gamma: divides the scale, > 0.

    **Cost**: one forward and backward pass over the observed rows, memory of d_out * d_in numbers for each layer until
    the adapters are made, and a decomposition of each gradient; then twice the rank in the forward pass and in the
    file.

    **Use it when** training has few steps: the first ones go where full training would.

    **Learning rate**: a tenth of the method's where none is set: at the whole of it the first steps overshot on a
    small trial (decision 9); not tuned.

    Differs from: the paper takes scaling * B0 A0 off the weight; here the base never changes, and the adapter takes it
    off what it adds. PEFT's ``stable`` is ``gradient`` here: it leaves the singular values on B and scales B alone, so
    that with small gradients B0 begins near zero. The gradient is taken of the layer as it is, rounded or not.

    References: Wang et al. 2024, arXiv:2407.05000, section 3.
    """

    needs = "gradients"
    moved = True
    rate = 0.1

    direction: str = "ArB2r"
    """Which singular vectors are A's and which B's."""
    scale: str = "stable"
    """How large the factors are: ``stable``, ``gradient`` or ``unit``."""
    gamma: float = 16.0
    """Divides the scale."""

    def problems(self) -> list[str]:
        found = number("gamma", self.gamma, above=0.0)
        for name, known in (("direction", _DIRECTIONS), ("scale", _SCALES)):
            if (value := getattr(self, name)) not in known:
                found.append(f"{name} must be one of {known}, got {value!r}")
        return found

    def problems_at(self, base: Base, rank: int) -> list[str]:
        limit = min(base.d_in, base.d_out) // 2
        return (
            [f"start 'lora_ga' takes 2 * rank vectors: rank {rank} exceeds {limit}"] if rank > limit else []
        )

    def observer(self, base: Base, rank: int) -> Observer:
        return _Gradient(base)

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert base.observed is not None
        U, S, Vh = leading_svd(base.observed["gradient"], 2 * rank)
        of_A, of_B = self._indices(rank, generator)
        c = base.d_out**0.25 / self.gamma**0.5
        A, B = Vh[of_A], U[:, of_B]
        if self.scale == "stable":
            return c * A, c * B
        return A, B * S[of_B] * c if self.scale == "gradient" else B

    def _indices(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        every = torch.arange(2 * rank)
        if self.direction == "random":
            drawn = torch.randperm(2 * rank, generator=generator)[:rank]
            return drawn, drawn
        first, second = (every[1::2], every[0::2]) if self.direction == "ArBr" else torch.split(every, rank)
        return (second, first) if self.direction == "A2rBr" else (first, second)


class _Gradient(Observer):
    """Mean of the gradient over batches."""

    def __init__(self, base: Base) -> None:
        dtype = torch.promote_types(base.dtype, torch.float32)
        self._sum = torch.zeros(base.d_out, base.d_in, dtype=dtype, device=base.device)
        self._batches = 0

    def see(self, seen: Tensor) -> None:
        self._sum += seen
        self._batches += 1

    def found(self) -> dict[str, Tensor]:
        return {"gradient": self._sum / max(self._batches, 1)}
