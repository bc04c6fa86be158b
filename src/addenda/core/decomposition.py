"""Singular vectors of a matrix, all of them or the leading ones only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_svd"]

_MORE = 8
"""Columns beyond the rank in a random sketch; a few make the last vectors wanted about as good as the first."""


def leading_svd(
    matrix: Tensor, rank: int, *, iterations: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors and values, in falling order.

    Args:
        matrix: (m, n), float32 or wider.
        rank: how many, 1 <= rank <= min(m, n).
        iterations: 0 decomposes the whole matrix. More draw a random sketch and multiply it so often by the matrix
            and its transpose: about 4 * iterations * (rank + 8) * m * n FLOP instead of some 10 * m * n * min(m, n).
        generator: draws the sketch.

    Returns:
        U (m, rank), S (rank,), V transposed (rank, n), with ``U * S @ Vh`` close to the matrix.

    References: Halko, Martinsson and Tropp 2011, SIAM Review 53(2), algorithm 4.4 (the sketch).

    Example:
        >>> leading_svd(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)[1]
        tensor([3., 2.])
    """
    if not iterations:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    width = min(rank + _MORE, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    Q = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix.t() @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.t() @ matrix, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vh[:rank]
