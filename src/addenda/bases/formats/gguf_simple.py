"""GGUF's blocks of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0."""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases.formats.bits import halves, nibbles, signed
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


register(
    WeightFormat("Q4_0", 32, 18, _q4_0, _SOURCE),
    WeightFormat("Q4_1", 32, 20, _q4_1, _SOURCE),
    WeightFormat("Q5_0", 32, 22, _q5_0, _SOURCE),
    WeightFormat("Q5_1", 32, 24, _q5_1, _SOURCE),
    WeightFormat("Q8_0", 32, 34, _q8_0, _SOURCE),
)
