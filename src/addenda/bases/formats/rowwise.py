"""INT8: a signed byte for each weight, scaled by its row's largest magnitude.

Dettmers et al. 2022, "LLM.int8()", the weight's side alone: codes and magnitudes are those that bitsandbytes keeps, and
no activation is quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases.formats.bits import signed, singles
from addenda.bases.formats.registry import Grid, WeightFormat, register

__all__ = ["from_bitsandbytes"]


def _decode(raw: Tensor) -> Tensor:
    return signed(raw[:, 4:]) * singles(raw[:, :4]) * (1 / 127)


def _encode(weight: Tensor) -> Tensor:
    absmax = weight.abs().amax(1)
    scale = 127 / torch.where(absmax == 0, 1.0, absmax)
    return from_bitsandbytes((weight * scale[:, None]).round().to(torch.int8), absmax)


def _scales(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(1, keepdim=True) / 127
    return scale, -127 * scale


def _pack(scale: Tensor, _least: Tensor, codes: Tensor) -> Tensor:
    return from_bitsandbytes((codes.to(torch.int16) - 127).to(torch.int8), 127 * scale)


def from_bitsandbytes(codes: Tensor, absmax: Tensor) -> Tensor:
    """Take over codes ``(rows, d_in)`` int8 and row magnitudes ``(rows,)`` (there called CB and SCB)."""
    head = absmax.float().flatten().contiguous()[:, None].view(torch.uint8)
    return torch.cat([head, codes.contiguous().view(torch.uint8)], dim=1)


register(
    WeightFormat(
        "INT8",
        None,
        4,
        _decode,
        _encode,
        "Dettmers et al. 2022; codes and magnitudes as bitsandbytes keeps them",
        Grid(254, 127, _scales, _pack, torch.float32),
    )
)
