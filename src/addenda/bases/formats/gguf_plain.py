"""GGUF's plain numbers: F32, F16 and BF16, each weight a block of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from addenda.bases.formats.registry import WeightFormat, register

__all__: list[str] = []


def _plain(name: str, dtype: torch.dtype) -> WeightFormat:
    def decode(raw: Tensor) -> Tensor:
        return raw.contiguous().view(dtype).float()

    def encode(blocks: Tensor) -> Tensor:
        return blocks.to(dtype).view(torch.uint8)

    return WeightFormat(name, 1, dtype.itemsize, decode, encode, "IEEE 754, and bfloat16 as its upper half")


register(_plain("F32", torch.float32), _plain("F16", torch.float16), _plain("BF16", torch.bfloat16))
