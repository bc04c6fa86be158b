"""INT8: a signed byte for each weight, scaled by its row's largest magnitude.

Dettmers et al. 2022, "LLM.int8()", the weight's side alone: codes and magnitudes are those that bitsandbytes keeps, and
no activation is quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases.formats.bits import signed, singles
from addenda.bases.formats.registry import WeightFormat, register
from addenda.errors import BaseModelError

__all__ = ["from_bitsandbytes", "quantize"]


def _decode(raw: Tensor) -> Tensor:
    return signed(raw[:, 4:]) * singles(raw[:, :4]) * (1 / 127)


def quantize(weight: Tensor) -> Tensor:
    """Pack a finite weight ``(rows, d_in)`` into ``(rows, d_in + 4)`` uint8.

    Raises:
        BaseModelError: a number is not finite.
    """
    wide = weight.float()
    if not bool(wide.isfinite().all()):
        raise BaseModelError(
            "a weight with numbers that are not finite cannot be packed", hint="fetch the model again"
        )
    absmax = wide.abs().amax(1)
    scale = 127 / torch.where(absmax == 0, 1.0, absmax)
    return from_bitsandbytes((wide * scale[:, None]).round().to(torch.int8), absmax)


def from_bitsandbytes(codes: Tensor, absmax: Tensor) -> Tensor:
    """Take over codes ``(rows, d_in)`` int8 and row magnitudes ``(rows,)`` (there called CB and SCB)."""
    head = absmax.float().reshape(-1, 1).contiguous().view(torch.uint8)
    return torch.cat([head, codes.contiguous().view(torch.uint8)], dim=1)


register(
    WeightFormat(
        "INT8",
        None,
        4,
        _decode,
        "Dettmers et al. 2022; codes and magnitudes as bitsandbytes keeps them",
        quantize,
    )
)
