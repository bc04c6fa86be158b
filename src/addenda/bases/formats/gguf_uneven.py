"""GGUF's four-bit codes for sixteen numbers that lie closer together near zero: IQ4_NL and IQ4_XS."""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases import ggml
from addenda.bases.formats.bits import halves, nibbles, table
from addenda.bases.formats.registry import WeightFormat, register

__all__: list[str] = []

_SOURCE = "ggml's block_iq4_* structures"
_NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _numbers(codes: Tensor) -> Tensor:
    return table(_NUMBERS, codes.device)[codes.int()]


def _iq4_nl(raw: Tensor) -> Tensor:
    return halves(raw[:, :2]) * _numbers(nibbles(raw[:, 2:], 16))


def _iq4_xs(raw: Tensor) -> Tensor:
    """A scale for each 32 weights: four low bits in bytes 4 to 7, two high ones in bytes 2 and 3."""
    by = torch.arange(0, 8, 2, dtype=torch.uint8, device=raw.device)
    high = ((raw[:, 2:4, None] >> by) & 3).reshape(-1, 8)
    scale = (nibbles(raw[:, 4:8], 1) | high << 4).float() - 32
    numbers = _numbers(nibbles(raw[:, 8:], 16)).view(len(raw), 8, 32)
    return ((halves(raw[:, :2]) * scale)[:, :, None] * numbers).view(len(raw), 256)


register(
    WeightFormat("IQ4_NL", 32, 18, _iq4_nl, ggml.encoder("IQ4_NL"), _SOURCE),
    WeightFormat("IQ4_XS", 256, 136, _iq4_xs, ggml.encoder("IQ4_XS"), _SOURCE),
)
