"""EVA: A begins as the directions in which the layer's inputs vary most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.observations import Observer
from addenda.core.ranges import flag, number
from addenda.core.starts import Start, start
from addenda.errors import MethodError
from addenda.methods.starts.kaiming import zero_factor

__all__ = ["EVA", "Components"]

_AT_ONCE = 128
"""Inputs joined to the components at a time; small Gram matrices are decomposed in little time."""


@start("eva")
@dataclass(frozen=True)
class EVA(Start):
    """The principal components of the layer's inputs on training rows, and B zero.

    A0: the leading right singular vectors of the centred inputs, orthonormal rows,   B0 = 0

    Args:
        rho: how much a layer's rank may grow, >= 1. Above 1 the sum of all ranks is dealt out anew, to the components
            that explain the largest share of the variance in their layer; each layer keeps a rank of 1 at least and
            gets rho times its own at most.
        whiten: divide each vector by the square root of its singular value, as suits images.

    **Cost**: one forward pass over the observed rows, and incremental decompositions of rho * rank + 128 rows at a
    time; memory of rho * rank * d_in numbers for each layer. Afterwards LoRA's.

    **Use it when** there are rows to look at and no step to lose: A's gradient is zero until B has moved, so it is A's
    directions that the first steps learn in.

    Differs from: the paper, and PEFT, go on until the vectors stay the same to a threshold; here all rows given are
    looked at once. With rho = 1 as the default, ranks stay as they are; PEFT's default is 2. PEFT drops layers that
    end with no rank.

    References: Paischer et al. 2024, arXiv:2410.07170, section 3 (algorithm 1). Ross et al. 2008, International Journal
    of Computer Vision 77 (incremental decomposition with a moving mean).
    """

    needs = "inputs"

    rho: float = 1.0
    """Largest factor by which a layer's rank may grow; 1 keeps the ranks."""
    whiten: bool = False
    """Divide each vector by the square root of its singular value."""

    def problems(self) -> list[str]:
        return number("rho", self.rho, least=1.0) + flag("whiten", self.whiten)

    def observer(self, base: Base, rank: int) -> Observer:
        return Components(base, min(round(self.rho * rank), base.d_in, base.d_out), least=rank)

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert base.observed is not None
        A = base.observed["components"][:rank]
        if self.whiten:
            A = A / base.observed["singular_values"][:rank, None].sqrt()
        return A, zero_factor(base, rank)

    def ranks(
        self, ranks: Mapping[str, int], layers: Mapping[str, Mapping[str, Tensor]]
    ) -> Mapping[str, int]:
        if self.rho == 1.0:
            return ranks
        # The first component of each layer is its own whatever it explains.
        open_to_all = [(share, path) for path in ranks for share in layers[path]["explained"].tolist()[1:]]
        chosen = sorted(open_to_all, key=lambda each: -each[0])[: sum(ranks.values()) - len(ranks)]
        return {path: 1 + sum(owner == path for _, owner in chosen) for path in ranks}


class Components(Observer):
    """Leading principal components of rows that come in pieces.

    Kept are the singular vectors times their values; a new piece, centred, is put under them with one more row for the
    move of the mean, and the whole is decomposed again.
    """

    def __init__(self, base: Base, most: int, *, least: int) -> None:
        self._path, self._most, self._least = base.path, most, least
        self._rows = torch.zeros(0, base.d_in, dtype=torch.float64, device=base.device)
        self._mean = torch.zeros(base.d_in, dtype=torch.float64, device=base.device)
        self._count = 0
        self._variation = 0.0

    def see(self, seen: Tensor) -> None:
        for piece in torch.split(seen.double(), _AT_ONCE):
            self._join(piece)

    def _join(self, piece: Tensor) -> None:
        n, total = len(piece), self._count + len(piece)
        if not n:
            return
        mean = piece.mean(0)
        moved = (mean - self._mean) * math.sqrt(self._count * n / total)
        new = torch.cat([piece - mean, moved[None]])
        self._variation += float(new.square().sum())
        rows = torch.cat([self._rows, new])
        squares, vectors = torch.linalg.eigh(rows @ rows.t())  # rising
        good = squares > 1e-12 * squares[-1]
        self._rows = vectors[:, good].flip(1)[:, : self._most].t() @ rows
        self._mean += (mean - self._mean) * (n / total)
        self._count = total

    def found(self) -> dict[str, Tensor]:
        if len(self._rows) < self._least:
            raise MethodError(
                f"the inputs of '{self._path}' vary in {len(self._rows)} directions, its rank is {self._least}",
                where={"inputs seen": self._count},
                hint="observe more rows, or lower the rank",
            )
        values = self._rows.norm(dim=1)
        return {
            "components": self._rows / values[:, None],
            "singular_values": values,
            "explained": values.square() / self._variation,
        }
