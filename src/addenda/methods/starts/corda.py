"""CorDA: the factors begin as the part of the weight that matters most, or least, for given inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.decomposition import leading_svd
from addenda.core.observations import Observer
from addenda.core.starts import Start, start, wide_weight
from addenda.errors import MethodError
from addenda.methods.starts.pissa import balanced

__all__ = ["CorDA"]

_MODES = ("ipm", "kpm")
_DAMPING = 0.01


@start("corda")
@dataclass(frozen=True)
class CorDA(Start):
    """The weight decomposed as its inputs see it: W C = U S V^T with C the covariance of the inputs.

    A0 = sqrt(S_r / scaling) V_r^T C^-1,   B0 = U_r sqrt(S_r / scaling)

    C is the mean over batches of X^T X, each batch divided by its largest absolute value, plus a hundredth of its mean
    diagonal on the diagonal, so that it can be inverted.

    Args:
        mode: ``ipm`` (instruction previewed) takes the r largest singular values: observe rows of the task. ``kpm``
            (knowledge preserved) takes the r smallest, so that what the rows need stays frozen: observe rows of what
            is to be kept. A recipe observes its training rows.

    **Cost**: a forward pass over the observed rows with 2 * d_in^2 FLOP for each token and layer, memory of d_in^2
    numbers for each layer, and a decomposition of each weight; then twice the rank in the forward pass and in the file.

    **Use it when** what the base knew is to be kept (``kpm``), or as PiSSA where the inputs are far from isotropic.

    **Learning rate**: a tenth of the method's where none is set: at the whole of it the first steps overshot on a
    small trial (decision 9); not tuned.

    Differs from: the paper and PEFT take scaling * B0 A0 off the weight; here the base never changes, and the adapter
    takes it off what it adds. PEFT divides by the largest value where this divides by the largest absolute one, and
    raises the damping until a float32 inverse is good to 0.05; here C is solved in float64.

    References: Yang et al. 2024, arXiv:2406.05223, section 3.
    """

    needs = "inputs"
    moved = True
    rate = 0.1

    mode: str = "ipm"
    """``ipm``: the directions that matter most for the observed inputs; ``kpm``: those that matter least."""

    def problems(self) -> list[str]:
        return [] if self.mode in _MODES else [f"mode must be one of {_MODES}, got {self.mode!r}"]

    def observer(self, base: Base, rank: int) -> Observer:
        return _Covariance(base)

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert base.observed is not None
        C = base.observed["covariance"].double()
        C = C + _DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        weight = wide_weight(base)
        U, S, Vh = leading_svd((weight.double() @ C).to(weight.dtype), min(weight.shape))
        part = slice(0, rank) if self.mode == "ipm" else slice(len(S) - rank, len(S))
        # C is symmetric: V^T C^-1 is the transpose of C^-1 V.
        seen = torch.linalg.solve(C, Vh[part].t().double()).t().to(weight.dtype)
        return balanced(U[:, part], S[part], seen, scaling)


class _Covariance(Observer):
    """Mean of X^T X over batches, each scaled to a largest absolute value of 1."""

    def __init__(self, base: Base) -> None:
        self._path, self._batches = base.path, 0
        dtype = torch.promote_types(base.dtype, torch.float32)
        self._sum = torch.zeros(base.d_in, base.d_in, dtype=dtype, device=base.device)

    def see(self, seen: Tensor) -> None:
        largest = seen.abs().amax() if len(seen) else 0
        if largest != 0:  # not a number is found out at the end
            scaled = seen / largest
            self._sum.addmm_(scaled.t(), scaled)
            self._batches += 1

    def found(self) -> dict[str, Tensor]:
        if not self._batches:
            raise MethodError(f"all inputs of '{self._path}' are zero", hint="observe other rows")
        return {"covariance": self._sum / self._batches}
