"""GGUF's blocks of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

They are rounded as ggml's reference rounds: codes by the scale in float32, which is itself rounded to half precision
afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases.formats.bits import as_halves, halves, nibbles, signed
from addenda.bases.formats.registry import WeightFormat, register

__all__: list[str] = []

_SOURCE = "ggml's block_q* structures"


def _fives(low: Tensor, high: Tensor) -> Tensor:
    """Four low bits (n, 16 bytes) and a fifth (n, 4 bytes, one bit for each weight) -> (n, 32) codes."""
    by = torch.arange(8, dtype=torch.uint8, device=low.device)
    fifth = ((high[:, :, None] >> by) & 1).reshape(len(high), 32)
    return nibbles(low, 16) | fifth << 4


def _q4_0(raw: Tensor) -> Tensor:
    return halves(raw[:, :2]) * (nibbles(raw[:, 2:], 16).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return halves(raw[:, :2]) * nibbles(raw[:, 4:], 16).float() + halves(raw[:, 2:4])


def _q5_0(raw: Tensor) -> Tensor:
    return halves(raw[:, :2]) * (_fives(raw[:, 6:], raw[:, 2:6]).float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    return halves(raw[:, :2]) * _fives(raw[:, 8:], raw[:, 4:8]).float() + halves(raw[:, 2:4])


def _q8_0(raw: Tensor) -> Tensor:
    return halves(raw[:, :2]) * signed(raw[:, 2:])


def _codes(x: Tensor, most: int) -> Tensor:
    """Whole parts up to ``most``; zero for a product that overflowed, which only subnormal scales do."""
    return torch.where(x < 256, x, 0).trunc().clamp(0, most).to(torch.uint8)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _centred(blocks: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the scale (n, 1) and codes (n, 32) of 0 to 2 half - 1: the number of largest magnitude has code 0."""
    d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -half
    return d, _codes(blocks * _inverse(d) + (half + 0.5), 2 * half - 1)


def _ranged(blocks: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scale and the least number, (n, 1) each, and codes (n, 32) of 0 to ``most`` above that."""
    least = blocks.amin(1, keepdim=True)
    d = (blocks.amax(1, keepdim=True) - least) / most
    return d, least, _codes((blocks - least) * _inverse(d) + 0.5, most)


def _fours(codes: Tensor) -> Tensor:
    return (codes[:, :16] & 15) | codes[:, 16:] << 4


def _fifths(codes: Tensor) -> Tensor:
    """The fifth bit of (n, 32) codes as (n, 4) bytes."""
    by = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) << by).sum(2, dtype=torch.uint8)


def _to_q4_0(blocks: Tensor) -> Tensor:
    d, codes = _centred(blocks, 8)
    return torch.cat([as_halves(d), _fours(codes)], dim=1)


def _to_q4_1(blocks: Tensor) -> Tensor:
    d, least, codes = _ranged(blocks, 15)
    return torch.cat([as_halves(d), as_halves(least), _fours(codes)], dim=1)


def _to_q5_0(blocks: Tensor) -> Tensor:
    d, codes = _centred(blocks, 16)
    return torch.cat([as_halves(d), _fifths(codes), _fours(codes)], dim=1)


def _to_q5_1(blocks: Tensor) -> Tensor:
    d, least, codes = _ranged(blocks, 31)
    return torch.cat([as_halves(d), as_halves(least), _fifths(codes), _fours(codes)], dim=1)


def _to_q8_0(blocks: Tensor) -> Tensor:
    d = blocks.abs().amax(1, keepdim=True) / 127
    scaled = (blocks * _inverse(d)).nan_to_num(0.0, 0.0, 0.0)
    whole = scaled.trunc()
    codes = whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()  # halves away from zero
    return torch.cat([as_halves(d), codes.to(torch.int8).view(torch.uint8)], dim=1)


register(
    WeightFormat("Q4_0", 32, 18, _q4_0, _to_q4_0, _SOURCE),
    WeightFormat("Q4_1", 32, 20, _q4_1, _to_q4_1, _SOURCE),
    WeightFormat("Q5_0", 32, 22, _q5_0, _to_q5_0, _SOURCE),
    WeightFormat("Q5_1", 32, 24, _q5_1, _to_q5_1, _SOURCE),
    WeightFormat("Q8_0", 32, 34, _q8_0, _to_q8_0, _SOURCE),
)
