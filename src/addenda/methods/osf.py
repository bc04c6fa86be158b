"""OSF: train the small singular directions of a weight, and keep away from the large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer, number, table
from addenda.core.registry import register
from addenda.core.starts import jointly
from addenda.core.targets import at, strays

__all__ = ["OSF", "OSFAdapter", "decomposed"]

_PARTS = ("U_high", "V_high", "U_low", "S_low", "V_low")
"""What a weight is decomposed into."""


@register("osf")
@dataclass(frozen=True)
class OSF(Method):
    """Orthogonal subspace fine-tuning: full-rank updates that the weight's largest singular directions never see.

    y = base(x) + (U diag(S) V - U0 diag(S0) V0) x,   U: (d_out, r),  S: (r,),  V: (r, d_in),  r = min(d_out, d_in) - k

    U0, S0 and V0 are what the singular value decomposition of W has beyond its k largest values. U, S and V start as
    these, so the adapted layer starts equal to its base. The gradients of U and V are freed of what lies along the k
    kept directions. Mergeable exactly into an unquantized weight. Parameters: r * (d_out + d_in + 1) per layer: with
    half of the directions kept about as many as the weight has.

    Args:
        kept: k: a whole number of directions, >= 1, or a share of min(d_out, d_in), > 0 and below 1.
        kept_in: another k for the layers a literal suffix names; the last that matches counts.

    **Cost**: that of training the whole weight, and more: U, S, V, their optimiser's state, and the frozen U0, S0, V0
    beside them, in float32. Each forward makes the update, 4 * r * d_in * d_out FLOP, and each forward and backward
    two projections, as many again. The adapter's file is twice the size of what is trained. **Use it when** a model
    is trained on one task after the other and must not lose the earlier ones, and full training fits.

    **Learning rate**: 5e-5, that of PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B).
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 3e-3.

    **Differs from**: the paper keeps more of layers whose output resembles their input, and decomposes the weight
    itself anew for each task; here k is a setting, and the base stays as it was. Gradients are made orthogonal, as in
    paper and PEFT; AdamW's steps along them are so only approximately.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, OSF(kept=3), targets=["0"]).trainable_parameters
        13

    References: Nayak et al. 2025, arXiv:2504.07097.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-5
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({}, {"kept": 7})

    kept: float = 0.5
    """How many of the largest singular directions are kept, or which share of all."""
    kept_in: Mapping[str, float] = field(default_factory=dict)
    """The same for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        return _amount("kept", self.kept) + table("kept_in", self.kept_in, _amount)

    def problems_at(self, base: Base) -> list[str]:
        kept, limit = self.kept_at(base), min(base.d_in, base.d_out)
        return (
            []
            if 0 < kept < limit
            else [f"kept = {kept} directions of {limit}: some have to be kept and some trained"]
        )

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        return strays(paths, kept_in=self.kept_in)

    def kept_at(self, base: Base) -> int:
        """Return how many directions of a layer are kept."""
        kept = at(base.path, self.kept_in, self.kept)
        return kept if isinstance(kept, int) else int(kept * min(base.d_in, base.d_out))

    def build(self, base: Base) -> OSFAdapter:
        kept = self.kept_at(base)
        rank = min(base.d_in, base.d_out) - kept
        shapes = {"U": (base.d_out, rank), "S": (rank,), "V": (rank, base.d_in)}
        # On the shorter side the complement of what is kept is what is trained, so it need not be held as well.
        longer = {"U": (base.d_out, kept)} if base.d_out > base.d_in else {"V": (kept, base.d_in)}
        high = longer if base.d_out != base.d_in else {}
        inits = jointly(lambda _: list(decomposed(base.weight(), kept).values()), len(_PARTS))
        init = dict(zip(_PARTS, inits, strict=True))
        trained = {name: base.parameter(*shape, init=init[f"{name}_low"]) for name, shape in shapes.items()}
        frozen = {f"{name}_low": shape for name, shape in shapes.items()}
        frozen |= {f"{name}_high": shape for name, shape in high.items()}
        return OSFAdapter(
            trained, {name: base.constant(*shape, init=init[name]) for name, shape in frozen.items()}
        )


def _amount(name: str, value: object) -> list[str]:
    return integer(name, value) if isinstance(value, int) else number(name, value, above=0.0, below=1.0)


def decomposed(weight: Tensor, kept: int) -> dict[str, Tensor]:
    """Return the singular directions of a weight, the ``kept`` largest as ``U_high`` and ``V_high``, the others as
    ``U_low``, ``S_low`` and ``V_low``."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, S, V = torch.linalg.svd(wide, full_matrices=False)
    parts = U[:, :kept], V[:kept], U[:, kept:], S[kept:], V[kept:]
    return dict(zip(_PARTS, parts, strict=True))


class OSFAdapter(Adapter):
    """U: (d_out, r), S: (r,), V: (r, d_in); U_low, S_low and V_low as these at the start, frozen; and of U_high
    (d_out, k) and V_high (k, d_in) the one on the longer side of the weight."""

    additive = True
    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    U_low: Tensor
    S_low: Tensor
    V_low: Tensor

    def __init__(self, trained: Mapping[str, nn.Parameter], frozen: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.hold(**trained, **frozen)

    def start_from(self, weight: Tensor) -> None:
        """Set the frozen tensors to what they are for a base with this (d_out, d_in) weight."""
        parts = decomposed(weight, min(weight.shape) - len(self.S))
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                buffer.copy_(parts[name])

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + base.apply(x, self._delta().to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self._delta().to(weight.dtype), bias

    def _delta(self) -> Tensor:
        buffers = dict(self.named_buffers())
        U = _freed(self.U, self.U_low, buffers.get("U_high"))
        high = buffers.get("V_high")
        V = _freed(self.V.t(), self.V_low.t(), None if high is None else high.t()).t()
        return (U * self.S) @ V - (self.U_low * self.S_low) @ self.V_low


def _freed(factor: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
    """The factor as it is, (d, r), its gradient without what lies along the kept directions."""
    along = low @ (low.t() @ factor) if high is None else factor - high @ (high.t() @ factor)
    return factor.detach() + (along - along.detach())
