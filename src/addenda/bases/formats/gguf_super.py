"""GGUF's blocks of 256 weights with a small integer scale for each group of 16 or 32: Q2_K to Q6_K."""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases import ggml
from addenda.bases.formats.bits import halves, nibbles, shifted, signed
from addenda.bases.formats.registry import WeightFormat, register

__all__: list[str] = []

_SOURCE = "ggml's block_q*_K structures"


def _grouped(scale: Tensor, codes: Tensor, least: Tensor | None = None) -> Tensor:
    """``(n, g)`` scales times ``(n, 256)`` codes in g groups, less each group's ``(n, g)`` least value."""
    values = scale[:, :, None] * codes.view(len(codes), scale.shape[1], -1)
    return (values if least is None else values - least[:, :, None]).view(len(codes), -1)


def _pairs(raw: Tensor) -> Tensor:
    """``(n, 64)`` bytes -> ``(n, 256)`` two-bit codes: of each 32 bytes the lowest pairs first."""
    return shifted(raw.reshape(-1, 32), range(0, 8, 2), 3).reshape(len(raw), 256)


def _sixes(raw: Tensor) -> tuple[Tensor, Tensor]:
    """``(n, 12)`` bytes -> eight scales and eight least values of six bits, ``(n, 8)`` each."""
    first, second, rest = raw.split(4, dim=1)
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], dim=1)
    least = torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], dim=1)
    return scale.float(), least.float()


def _q2_k(raw: Tensor) -> Tensor:
    scale, least = (raw[:, :16] & 15).float(), (raw[:, :16] >> 4).float()
    d = halves(raw[:, 80:])
    return _grouped(d[:, :1] * scale, _pairs(raw[:, 16:80]).float(), d[:, 1:] * least)


def _q3_k(raw: Tensor) -> Tensor:
    low = nibbles(raw[:, 96:104], 8)
    high = shifted(raw[:, 104:108], range(0, 8, 2), 3).reshape(-1, 16)
    scale = (low | high << 4).float() - 32
    third = shifted(raw[:, :32], range(8), 1).reshape(-1, 256)
    return _grouped(halves(raw[:, 108:]) * scale, (_pairs(raw[:, 32:96]) | third << 2).float() - 4)


def _q4_k(raw: Tensor) -> Tensor:
    d, (scale, least) = halves(raw[:, :4]), _sixes(raw[:, 4:16])
    return _grouped(d[:, :1] * scale, nibbles(raw[:, 16:], 32).float(), d[:, 1:] * least)


def _q5_k(raw: Tensor) -> Tensor:
    d, (scale, least) = halves(raw[:, :4]), _sixes(raw[:, 4:16])
    fifth = shifted(raw[:, 16:48], range(8), 1).reshape(-1, 256)
    return _grouped(d[:, :1] * scale, (nibbles(raw[:, 48:], 32) | fifth << 4).float(), d[:, 1:] * least)


def _q6_k(raw: Tensor) -> Tensor:
    codes = nibbles(raw[:, :128], 64) | _pairs(raw[:, 128:192]) << 4
    return _grouped(halves(raw[:, 208:]) * signed(raw[:, 192:208]), codes.float() - 32)


register(
    WeightFormat("Q2_K", 256, 84, _q2_k, ggml.encoder("Q2_K"), _SOURCE),
    WeightFormat("Q3_K", 256, 110, _q3_k, ggml.encoder("Q3_K"), _SOURCE),
    WeightFormat("Q4_K", 256, 144, _q4_k, ggml.encoder("Q4_K"), _SOURCE),
    WeightFormat("Q5_K", 256, 176, _q5_k, ggml.encoder("Q5_K"), _SOURCE),
    WeightFormat("Q6_K", 256, 210, _q6_k, ggml.encoder("Q6_K"), _SOURCE),
)
