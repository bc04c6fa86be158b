"""GGUF's blocks of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

They are rounded as ggml's reference rounds: codes by the scale in float32, which is itself rounded to half precision
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from addenda.bases.formats.bits import as_halves, halves, nibbles, signed
from addenda.bases.formats.registry import Grid, WeightFormat, register

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


def _centred(blocks: Tensor, half: int) -> Tensor:
    """The scale (n, 1) by which the number of largest magnitude has code 0, and zero the code ``half``."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -half


def _ranged(blocks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The scale and the least number, (n, 1) each: codes go from that, 0, to the greatest, ``most``."""
    least = blocks.amin(1, keepdim=True)
    return (blocks.amax(1, keepdim=True) - least) / most, least


def _fours(codes: Tensor) -> Tensor:
    return (codes[:, :16] & 15) | codes[:, 16:] << 4


def _fifths(codes: Tensor) -> Tensor:
    """The fifth bit of (n, 32) codes as (n, 4) bytes."""
    by = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) << by).sum(2, dtype=torch.uint8)


def _whole(blocks: Tensor, d: Tensor) -> Tensor:
    """Whole numbers of scales, halves away from zero: (n, 32) int8."""
    scaled = (blocks * _inverse(d)).nan_to_num(0.0, 0.0, 0.0)
    whole = scaled.trunc()
    return (whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()).to(torch.int8)


def _centred_format(name: str, size: int, decode: Callable[[Tensor], Tensor], half: int) -> WeightFormat:
    def scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
        d = _centred(blocks, half)
        return d, -half * d

    def pack(d: Tensor, _least: Tensor, codes: Tensor) -> Tensor:
        high = [_fifths(codes)] if half > 8 else []
        return torch.cat([as_halves(d), *high, _fours(codes)], dim=1)

    def encode(blocks: Tensor) -> Tensor:
        d, least = scales(blocks)
        return pack(d, least, _codes(blocks * _inverse(d) + (half + 0.5), 2 * half - 1))

    return WeightFormat(name, 32, size, decode, encode, _SOURCE, Grid(2 * half - 1, half, scales, pack))


def _ranged_format(name: str, size: int, decode: Callable[[Tensor], Tensor], most: int) -> WeightFormat:
    def scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return _ranged(blocks, most)

    def pack(d: Tensor, least: Tensor, codes: Tensor) -> Tensor:
        high = [_fifths(codes)] if most > 15 else []
        return torch.cat([as_halves(d), as_halves(least), *high, _fours(codes)], dim=1)

    def encode(blocks: Tensor) -> Tensor:
        d, least = scales(blocks)
        return pack(d, least, _codes((blocks - least) * _inverse(d) + 0.5, most))

    return WeightFormat(name, 32, size, decode, encode, _SOURCE, Grid(most, None, scales, pack))


def _bytes_format() -> WeightFormat:
    def scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
        d = blocks.abs().amax(1, keepdim=True) / 127
        return d, -127 * d

    def pack(d: Tensor, _least: Tensor, codes: Tensor) -> Tensor:
        signed_codes = (codes.to(torch.int16) - 127).to(torch.int8)
        return torch.cat([as_halves(d), signed_codes.view(torch.uint8)], dim=1)

    def encode(blocks: Tensor) -> Tensor:
        d, _ = scales(blocks)
        return torch.cat([as_halves(d), _whole(blocks, d).view(torch.uint8)], dim=1)

    return WeightFormat("Q8_0", 32, 34, _q8_0, encode, _SOURCE, Grid(254, 127, scales, pack))


register(
    _centred_format("Q4_0", 18, _q4_0, 8),
    _ranged_format("Q4_1", 20, _q4_1, 15),
    _centred_format("Q5_0", 22, _q5_0, 16),
    _ranged_format("Q5_1", 24, _q5_1, 31),
    _bytes_format(),
)
