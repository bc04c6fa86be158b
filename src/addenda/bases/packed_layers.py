"""Layers that keep their weight packed: its numbers exist for one tile of rows at a time, in one buffer used again.

A tile is unpacked, multiplied and forgotten, in the forward as in the backward, so a layer holds its raw bytes and no
more. With the rows of a training batch the products take far longer than the unpacking.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from addenda.bases.formats import WeightFormat
from addenda.core.lowrank import frozen_linear
from addenda.memory.arena import empty

__all__ = ["PackedEmbedding", "PackedLinear", "pack_linears", "packed_layers"]

TILE, GPU_TILE = 2**20, 2**24
"""Weights unpacked at once; a longer row is a tile of its own. Smaller tiles make thinner, slower products; on a GPU
unpacking is a dozen passes that each have to be worth starting; they hold about 16 bytes for each of the weights."""


class _Buffers(threading.local):
    """One tile for each dtype and device, of this thread alone."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def tile(self, rows: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self.held.get((dtype, device))
        if held is None or held.numel() < rows * d_in:
            held = self.held[dtype, device] = torch.empty(rows * d_in, dtype=dtype, device=device)
        return held[: rows * d_in].view(rows, d_in)


_buffers = _Buffers()


class _Packed(nn.Module):
    """Raw rows, their format, and the dtype to compute in."""

    raw: Tensor
    _like: Tensor

    def __init__(self, raw: Tensor, weight_format: WeightFormat, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_format = weight_format
        self.width = width
        self.register_buffer("raw", raw)
        # Empty, and only to follow .to(dtype) and .to(device) as a weight would.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=raw.device), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return self._like.dtype

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the weight: ``(rows, width)``."""
        return len(self.raw), self.width

    def dequantized(self, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, ``(rows, width)`` in a dtype or `compute_dtype`, or the rows of an index ``(n,)``."""
        raw = self.raw if rows is None else self.raw[rows]
        out = self._like.new_empty(len(raw), self.width, dtype=dtype)
        return self.weight_format.dequantize(raw, self.width, out)

    def extra_repr(self) -> str:
        """Shape and format, for ``print(model)``."""
        return f"{len(self.raw)} x {self.width}, {self.weight_format.name}, computes in {self.compute_dtype}"


class PackedLinear(_Packed):
    """A frozen linear layer on a packed weight.

    Args:
        raw: ``(d_out, bytes of a row)`` uint8.
        weight_format: how the rows are packed.
        d_in: features of the input.
        bias: ``(d_out,)``, or None.
        dtype: of inputs and outputs.

    Example:
        >>> import torch
        >>> from addenda.bases import formats
        >>> int8 = formats.get("INT8")
        >>> layer = PackedLinear(int8.quantize(torch.eye(4) * 127), int8, 4)
        >>> layer(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        [127.0, 254.0, 381.0, 508.0]
    """

    bias: Tensor | None

    def __init__(
        self,
        raw: Tensor,
        weight_format: WeightFormat,
        d_in: int,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(raw, weight_format, d_in, dtype)
        self.in_features, self.out_features = d_in, len(raw)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., d_in) -> (..., d_out)."""
        if torch.compiler.is_compiling():
            return functional.linear(input, self.dequantized(), self.bias)
        return frozen_linear(input, self)

    def linear(self, x: Tensor) -> Tensor:
        """x: (n, d_in) -> W x + b: (n, d_out)."""
        y = empty((len(x), self.out_features), x)
        if len(x):
            for span, weight in self._tiles(x.dtype):
                torch.mm(x, weight.t(), out=y[:, span])
        return y if self.bias is None else y.add_(self.bias)

    def grad_input(self, g: Tensor) -> Tensor:
        """g: (n, d_out) -> Wᵀ g: (n, d_in)."""
        return self.add_grad_input(g.new_zeros(len(g), self.in_features), g)

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        """Add Wᵀ g to ``total`` (n, d_in) in place, and return it."""
        # Every tile adds to all of the sum, so a sum in fewer bits would be rounded once a tile.
        narrow = total.dtype.itemsize < 4
        wide = total.float() if narrow else total
        for span, weight in self._tiles(g.dtype):
            if narrow:
                wide.add_(g[:, span] @ weight)
            else:
                wide.addmm_(g[:, span], weight)
        return total.copy_(wide) if narrow else total

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield spans of rows and their weights, ``(rows, d_in)``; each is overwritten by the next."""
        rows = max(1, (GPU_TILE if self.raw.is_cuda else TILE) // self.width)
        for start in range(0, self.out_features, rows):
            raw = self.raw[start : start + rows]
            tile = _buffers.tile(len(raw), self.width, dtype, raw.device)
            yield slice(start, start + len(raw)), self.weight_format.dequantize(raw, self.width, tile)


class PackedEmbedding(_Packed):
    """A frozen embedding on a packed weight: only the rows that are looked up are unpacked.

    Args:
        raw: ``(rows, bytes of a row)`` uint8; a tied output head shares it.
        weight_format: how the rows are packed.
        width: features of a row.
        scale: factor on what is looked up, rounded to the dtype first; None for none.
        dtype: of the output.
    """

    def __init__(
        self,
        raw: Tensor,
        weight_format: WeightFormat,
        width: int,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(raw, weight_format, width, dtype)
        self.num_embeddings, self.embedding_dim = len(raw), width
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """input: (...) ids -> (..., width)."""
        found = self.dequantized(input.flatten()).view(*input.shape, self.width)
        return found if self.scale is None else found.mul_(self._like.new_tensor(self.scale))


def pack_linears(model: nn.Module, weight_format: WeightFormat, keep: nn.Module | None = None) -> int:
    """Replace the plain linear layers of a model by packed ones; return how many.

    Args:
        model: changed in place.
        weight_format: how they are packed. Layers whose rows are not whole blocks of it stay dense.
        keep: a layer to leave dense, as the output head.

    Raises:
        BaseModelError: a weight is not finite.
    """
    plain = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module is not keep
    ]
    fitting = [(path, m) for path, m in plain if m.in_features % (weight_format.block or 1) == 0]
    for path, module in fitting:
        raw = weight_format.quantize(module.weight)
        packed = PackedLinear(raw, weight_format, module.in_features, module.bias, module.weight.dtype)
        model.set_submodule(path, packed.train(module.training))
    return len(fitting)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """Return the packed layers of a model by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear | PackedEmbedding)
    }
