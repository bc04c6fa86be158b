"""NF4: four-bit codes for sixteen quantiles of the normal distribution, scaled by each 64 weights' largest magnitude.

Dettmers et al. 2023, "QLoRA". A block is its largest magnitude (float32) and the 32 bytes that bitsandbytes keeps for
the same 64 weights, so its tensors convert both ways without loss. Double quantisation holds the magnitudes in eight
bits; they come out of it as float32 and are kept so, which makes 4.5 bits a weight of 4.13.
"""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases.formats.bits import singles, table
from addenda.bases.formats.registry import Grid, WeightFormat, register
from addenda.errors import BaseModelError

__all__ = ["LEVELS", "from_bitsandbytes", "to_bitsandbytes"]

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _decode(raw: Tensor) -> Tensor:
    codes = torch.stack([raw[:, 4:] >> 4, raw[:, 4:] & 15], dim=-1).view(len(raw), BLOCK)
    return table(LEVELS, raw.device)[codes.int()] * singles(raw[:, :4])


def _scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    absmax = blocks.abs().amax(1, keepdim=True)
    return absmax, torch.zeros_like(absmax)


def _pack(absmax: Tensor, _least: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([absmax.contiguous().view(torch.uint8), codes[:, ::2] << 4 | codes[:, 1::2]], dim=1)


_GRID = Grid(15, None, _scales, _pack, torch.float32, LEVELS)


def _encode(blocks: Tensor) -> Tensor:
    """The nearest level for each number."""
    absmax, zero = _scales(blocks)
    codes = _GRID.nearest(blocks / torch.where(absmax == 0, 1.0, absmax))
    return _pack(absmax, zero, codes.to(torch.uint8))


def from_bitsandbytes(
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    nested: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Take over a weight that bitsandbytes packed as NF4 with blocks of 64.

    Args:
        codes: uint8, half as many as weights, of any shape.
        absmax: each block's largest magnitude: float32, or uint8 under double quantisation.
        shape: ``(rows, d_in)`` of the weight, d_in a multiple of 64.
        nested: under double quantisation its levels (256), its magnitudes (one for each 256 blocks), and its offset.

    Returns:
        ``(rows, d_in / 64 * 36)`` uint8.

    Raises:
        BaseModelError: the counts do not fit the shape.
    """
    rows, d_in = shape
    row_bytes = _FORMAT.row_bytes(d_in)
    blocks = rows * d_in // BLOCK
    if codes.numel() * 2 != rows * d_in or absmax.numel() != blocks:
        raise BaseModelError(
            "the packed weight does not fit its shape",
            where={"shape": shape, "codes": codes.numel(), "magnitudes": absmax.numel()},
            hint="only NF4 with blocks of 64 is read",
        )
    if nested is not None:
        levels, magnitudes, offset = nested
        by_block = magnitudes.float().repeat_interleave(256)[:blocks]
        absmax = levels.float()[absmax.int().flatten()] * by_block + offset
    head = absmax.float().reshape(-1, 1).contiguous().view(torch.uint8)
    return torch.cat([head, codes.reshape(-1, BLOCK // 2)], dim=1).view(rows, row_bytes)


def to_bitsandbytes(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes ``(n / 2, 1)`` uint8 and magnitudes ``(n / 64,)`` float32 that bitsandbytes would keep."""
    blocks = raw.reshape(-1, _FORMAT.block_bytes)
    return blocks[:, 4:].reshape(-1, 1), singles(blocks[:, :4])[:, 0]


_FORMAT = WeightFormat(
    "NF4",
    BLOCK,
    36,
    _decode,
    _encode,
    "Dettmers et al. 2023; bytes of a block as bitsandbytes keeps them",
    _GRID,
)
register(_FORMAT)
