"""Low-rank terms on a layer that count differently for each token, as where a router mixes adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from addenda.core.contract import Base

__all__ = ["Factors", "add_gated"]

Factors = tuple[Tensor, Tensor, float]
"""A (rank, d_in), B (d_out, rank) and the scaling, as `Adapter.low_rank_term` gives them."""


def add_gated(x: Tensor, base: Base, terms: Sequence[Factors], gates: Tensor) -> Tensor:
    """Return base(x) + the sum over e of gates_e scaling_e B_e A_e x, without running what a token does not use twice.

    All A are one thin product and all B another: dense, because gathering the tokens of each adapter costs more than
    ranks this small save.

    Args:
        x: (..., d_in), features last.
        base: a layer whose weight maps the last dimension, `Base.pointwise`.
        terms: one for each adapter; their ranks may differ.
        gates: (..., adapters), dimensionless; its leading dimensions are those of ``x``.

    Returns:
        (..., d_out) in the layer's dtype.
    """
    A = torch.cat([A for A, _, _ in terms]).to(base.dtype)
    B = torch.cat([scaling * B for _, B, scaling in terms], dim=1).to(base.dtype)
    ranks = torch.tensor([len(A) for A, _, _ in terms], device=gates.device)
    each = gates.to(base.dtype).repeat_interleave(ranks, dim=-1, output_size=len(A))
    return base(x) + F.linear(F.linear(x, A) * each, B)
