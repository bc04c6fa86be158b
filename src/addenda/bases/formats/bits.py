"""Reading numbers out of bytes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_halves", "halves", "nibbles", "shifted", "signed", "singles", "table"]

_tables: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def halves(raw: Tensor) -> Tensor:
    """``(n, 2 k)`` bytes as ``(n, k)`` half-precision numbers, widened to float32."""
    return raw.contiguous().view(torch.float16).float()


def as_halves(numbers: Tensor) -> Tensor:
    """``(n, k)`` float32 as the ``(n, 2 k)`` bytes of half-precision numbers."""
    return numbers.to(torch.float16).view(torch.uint8)


def singles(raw: Tensor) -> Tensor:
    """``(n, 4 k)`` bytes as ``(n, k)`` float32."""
    return raw.contiguous().view(torch.float32)


def signed(raw: Tensor) -> Tensor:
    """Bytes as two's-complement numbers, in float32."""
    return raw.view(torch.int8).float()


def shifted(raw: Tensor, shifts: range, mask: int) -> Tensor:
    """``(n, k)`` bytes -> ``(n, len(shifts), k)``: the bits above each shift, masked."""
    by = torch.arange(shifts.start, shifts.stop, shifts.step, dtype=torch.uint8, device=raw.device)
    return (raw[:, None] >> by[None, :, None]) & mask


def nibbles(raw: Tensor, run: int) -> Tensor:
    """``(n, k)`` bytes -> ``(n, 2 k)``: of each ``run`` bytes the lower halves, then the upper ones."""
    return shifted(raw.reshape(-1, run), range(0, 8, 4), 15).reshape(len(raw), -1)


def table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers that codes stand for, float32 on a device; made once for each, since a GPU is waited for by it."""
    if torch.compiler.is_compiling() or (numbers, device) not in _tables:
        made = torch.tensor(numbers, dtype=torch.float32, device=device)
        if type(made) is not Tensor or torch.compiler.is_compiling():  # traced: it holds no numbers to keep
            return made
        _tables[numbers, device] = made
    return _tables[numbers, device]
