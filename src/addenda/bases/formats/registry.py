"""What a weight format is, and the registry of them; a new one is one entry in a file of this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.bases.formats.bits import table
from addenda.errors import BaseModelError, NotFoundError, nearest
from addenda.kernels import calls

__all__ = ["Grid", "WeightFormat", "find", "get", "names", "register"]


@dataclass(frozen=True)
class Grid:
    """What the numbers of a block are: ``scale * level + least``, a level for each code and one scale for the block."""

    most: int
    """The highest code."""
    centre: int | None
    """The code that stands for zero, so that the least number follows from the scale; None where it is kept too."""
    scales: Callable[[Tensor], tuple[Tensor, Tensor]]
    """``(n, block)`` float32 -> the scale and the least number that the writer takes, ``(n, 1)`` each, in float32."""
    pack: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Scale and least number ``(n, 1)``, codes ``(n, block)`` uint8 -> ``(n, bytes)``."""
    kept: torch.dtype = torch.float16
    """In which scale and least number are kept."""
    levels: tuple[float, ...] | None = None
    """The level of each code, rising from -1 to 1, so that the scale is the largest magnitude, the least number zero.
    None where a code is its own level."""

    def nearest(self, scaled: Tensor) -> Tensor:
        """Return the codes of the levels that are nearest to some numbers, in units of the scale from the least one."""
        if self.levels is None:
            return scaled.round().clamp_(0, self.most)
        levels = table(self.levels, scaled.device)
        return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)

    def level(self, codes: Tensor) -> Tensor:
        """Return the levels of codes that `nearest` gave."""
        return codes if self.levels is None else table(self.levels, codes.device)[codes]


@dataclass(frozen=True)
class WeightFormat:
    """A way to hold a weight matrix in few bits: every row is whole blocks, and each block decodes by itself."""

    name: str
    """As in GGUF files where it comes from there; also the name of its kernel, if it has one."""
    block: int | None
    """Weights in a block; None where the whole row is one."""
    block_bytes: int
    """Bytes of a block; where the whole row is one, its bytes beside one for each weight."""
    decode: Callable[[Tensor], Tensor]
    """``(blocks, bytes)`` uint8 -> ``(blocks, weights)`` float32, in plain PyTorch on any device."""
    encode: Callable[[Tensor], Tensor]
    """``(blocks, weights)`` finite float32 -> ``(blocks, bytes)`` uint8, likewise; where the whole row is one, rows."""
    source: str
    """What defines the layout."""
    grid: Grid | None = None
    """How codes may be chosen by somebody else; None where their scales are searched."""

    def row_bytes(self, d_in: int) -> int:
        """Bytes of a row of ``d_in`` weights.

        Raises:
            BaseModelError: such a row is not whole blocks.

        Example:
            >>> get("Q4_1").row_bytes(64), get("INT8").row_bytes(10)
            (40, 14)
        """
        if self.block is None:
            return d_in + self.block_bytes
        if d_in % self.block:
            raise BaseModelError(
                f"rows of {d_in:,} weights are not whole blocks of {self.block} in format '{self.name}'",
                hint="keep this weight dense",
            )
        return d_in // self.block * self.block_bytes

    def quantize(self, weight: Tensor) -> Tensor:
        """Round a weight to the format and pack it.

        Args:
            weight: ``(rows, d_in)`` of any floating dtype, finite.

        Returns:
            ``(rows, row_bytes(d_in))`` uint8; the kernel and the PyTorch form give the same bytes.

        Raises:
            BaseModelError: the rows are not whole blocks, or a number is not finite.

        Example:
            >>> entry = get("Q8_0")
            >>> round(float(entry.dequantize(entry.quantize(torch.full((1, 32), 0.5)), 32)[0, 0]), 3)
            0.5
        """
        rows, d_in = weight.shape
        row_bytes = self.row_bytes(d_in)
        if weight.is_meta:
            return weight.new_empty(rows, row_bytes, dtype=torch.uint8)
        wide = weight.detach().float().contiguous()
        if wide.numel() and not all(bool(end.isfinite()) for end in wide.aminmax()):
            raise BaseModelError(
                "a weight with numbers that are not finite cannot be packed",
                hint="fetch the model again, or look at the adapter that was added to it",
            )
        if calls.quantizes(self.name, wide):
            return calls.quantize(self.name, wide, row_bytes)
        return self.encode(wide.view(-1, self.block or d_in)).view(rows, row_bytes)

    def dequantize(self, raw: Tensor, d_in: int, out: Tensor | None = None) -> Tensor:
        """Decode whole rows.

        Args:
            raw: ``(rows, row_bytes(d_in))`` uint8, contiguous.
            d_in: weights of a row.
            out: ``(rows, d_in)`` float32 or bfloat16 to write into; None makes a float32 one.

        Returns:
            ``(rows, d_in)``. The kernel and the PyTorch form give the same bits; bfloat16 is float32 rounded to
            nearest, ties to even.
        """
        if out is None:
            out = raw.new_empty((len(raw), d_in), dtype=torch.float32)
        if not torch.compiler.is_compiling() and calls.dequantizes(self.name, raw, out):
            return calls.dequantize(self.name, raw, out)
        size = self.row_bytes(d_in) if self.block is None else self.block_bytes
        return out.copy_(self.decode(raw.reshape(-1, size)).view(out.shape))


_FORMATS: dict[str, WeightFormat] = {}


def register(*formats: WeightFormat) -> None:
    """Make formats known by their names.

    Raises:
        BaseModelError: a name is taken.
    """
    for entry in formats:
        if entry.name in _FORMATS:
            raise BaseModelError(
                f"weight format '{entry.name}' is registered twice", hint="give one another name"
            )
        _FORMATS[entry.name] = entry


def names() -> list[str]:
    """Return the names of all formats, sorted."""
    _discover()
    return sorted(_FORMATS)


def find(name: str) -> WeightFormat | None:
    """Return the format of that name, or None."""
    _discover()
    return _FORMATS.get(name)


def get(name: str) -> WeightFormat:
    """Return the format of that name.

    Raises:
        NotFoundError: there is none.
    """
    found = find(name)
    if found is None:
        near = nearest(name, _FORMATS)
        raise NotFoundError(
            f"no weight format is called '{name}'",
            where={"formats": " ".join(names())},
            hint=f"did you mean '{near[0]}'?" if near else "keep the weight dense: base.weights=dense",
        )
    return found


@functools.cache
def _discover() -> None:
    room = importlib.import_module("addenda.bases.formats")
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"addenda.bases.formats.{module.name}")
