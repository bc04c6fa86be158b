"""The change of low rank that an adapter makes to a layer, as two factors; those of experts stacked and taken apart.

llama.cpp multiplies each token by the factors of the experts that it was sent to, as it does with their weights: the
factors of all experts of a layer lie in two tensors of three dimensions, of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from addenda.core.handle import Handle
from addenda.core.whole import WholeAdapter
from addenda.errors import ExportError

__all__ = ["Factors", "StackedFactors", "apart", "factors_of", "stacked", "trimmed"]


@dataclass(frozen=True)
class Factors:
    """scaling B A is added to a weight."""

    A: Tensor
    """(rank, d_in) float32."""
    B: Tensor
    """(d_out, rank) float32; rows in the model's order."""
    scaling: float

    @property
    def alpha(self) -> float:
        """The scaling times the rank, as a file holds it."""
        return float(np.float32(self.scaling * len(self.A)))

    def delta(self) -> Tensor:
        """Return scaling B A, (d_out, d_in)."""
        return self.scaling * (self.B @ self.A)


def factors_of(handle: Handle) -> dict[str, Factors]:
    """Return the factors of an adapter on each layer, by path.

    Raises:
        ExportError: on some layer it is not a change of low rank alone.
    """
    found, other = {}, []
    for path, adapter in handle.adapters.items():
        term = None if isinstance(adapter, WholeAdapter) else adapter.eval().low_rank_term()
        if term is None:
            other.append(path)
            continue
        A, B, scaling = term
        found[path] = Factors(A.detach().float().cpu(), B.detach().float().cpu(), float(scaling))
    if other:
        raise ExportError(
            f"a GGUF adapter holds changes of low rank alone, and on {len(other)} layers this one is another",
            where={"first": other[0], "method": handle.method.name},
            hint="'--to gguf' merges it into the base, if its method can be merged",
        )
    return found


@dataclass(frozen=True)
class StackedFactors:
    """Of all experts of a layer, for the rows of their weights that one tensor of the file holds."""

    A: Tensor
    """(experts, rank, d_in) float32."""
    B: Tensor
    """(experts, rows, rank) float32."""
    rows: slice
    """Which rows of each expert's weight these are."""
    scaling: float


def stacked(factors: Sequence[Factors | None], rows: slice, alpha: float) -> StackedFactors | None:
    """Stack the factors of a layer's experts, those of lower rank filled up with zeros; None where none has any.

    Args:
        factors: by expert; None for one that is as it was.
        rows: of each expert's weight, those to take.
        alpha: what the runtime divides by the rank to scale by; what an expert's own differs by goes into its B.
    """
    given = [each for each in factors if each]
    if not given:
        return None
    rank = max(len(each.A) for each in given)
    A = torch.zeros(len(factors), rank, given[0].A.shape[1])
    B = torch.zeros(len(factors), rows.stop - rows.start, rank)
    for expert, each in enumerate(factors):
        if each:
            A[expert, : len(each.A)] = each.A
            B[expert, :, : len(each.A)] = each.B[rows] * (float(np.float32(each.scaling * rank)) / alpha)
    return StackedFactors(A, B, rows, alpha / rank)


def apart(stacks: Sequence[StackedFactors], d_out: int) -> list[Factors | None]:
    """Take the factors of a layer's experts apart: the inverse of `stacked`, for all tensors that hold rows of theirs.

    Tensors of the same A share it; else the ranks add up, each for its own rows.

    Args:
        stacks: what there is; rows that none of them holds are not changed.
        d_out: rows of an expert's weight.
    """
    return [_of_expert(expert, stacks, d_out) for expert in range(len(stacks[0].A))]


def _of_expert(expert: int, stacks: Sequence[StackedFactors], d_out: int) -> Factors | None:
    first = stacks[0]
    shared = all(
        torch.equal(each.A[expert], first.A[expert]) and each.scaling == first.scaling for each in stacks
    )
    parts, scaling = (stacks[:1], first.scaling) if shared else (stacks, 1.0)
    A = torch.cat([each.A[expert] for each in parts])
    B, start = torch.zeros(d_out, len(A)), 0
    for each in stacks:
        stop = start + each.A.shape[1]
        B[each.rows, start:stop] = each.B[expert] * (1.0 if shared else each.scaling)
        start = start if shared else stop
    return trimmed(Factors(A, B, scaling))


def trimmed(factors: Factors) -> Factors | None:
    """Leave off the last rows of A, and columns of B, that are zero; None where all are."""
    used = (factors.A.any(1) | factors.B.any(0)).nonzero()
    rank = int(used.max()) + 1 if len(used) else 0
    return Factors(factors.A[:rank], factors.B[:, :rank], factors.scaling) if rank else None
