"""A cache that holds the keys and values in front of a sequence, in the form in which transformers asks for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PrefixCache", "cached_blocks"]


class PrefixCache:
    """Keys and values that attention finds before those of the tokens.

    Unless it keeps tokens it changes nothing by being read, so a block that is run again in the backward reads the
    same; gradients go to the prefix through every layer.

    Args:
        prefix: ``(layers, 2, heads, n, head_width)``.
        keeps: whether to keep the keys and values of the tokens as well, for the tokens that follow.
    """

    is_compileable = False

    def __init__(self, prefix: Tensor, *, keeps: bool = False) -> None:
        self.prefix, self.keeps = prefix, keeps
        self.read: set[int] = set()
        """Layers that have read it."""
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def with_more(self, prefix: Tensor) -> PrefixCache:
        """Return one with another prefix behind this one; what reads it has read this one too."""
        more = PrefixCache(torch.cat([self.prefix, prefix], dim=-2), keeps=self.keeps)
        more.read = self.read
        return more

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions lie before the tokens of the next call."""
        kept = self._kept[layer_idx][0].shape[-2] if layer_idx in self._kept else 0
        return int(self.prefix.shape[-2]) + kept

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the next call's first token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys the next call's tokens find, and the position of the first."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def kept(self, layers: int) -> Tensor:
        """Return the keys and values of the tokens of one text, ``(layers, 2, heads, T, head_width)``."""
        return torch.stack([torch.stack([part[0] for part in self._kept[layer]]) for layer in range(layers)])

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what a layer attends to, given the keys and values of its tokens, ``(B, heads, T, head_width)``."""
        self.read.add(layer_idx)
        if self.keeps:
            if layer_idx in self._kept:
                before = self._kept[layer_idx]
                keys, values = torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)
            self._kept[layer_idx] = (keys, values)
        front = self.prefix[layer_idx].to(keys.dtype)
        first, second = (part.expand(len(keys), -1, -1, -1) for part in front)
        return torch.cat([first, keys], dim=-2), torch.cat([second, values], dim=-2)


@contextlib.contextmanager
def cached_blocks(model: nn.Module) -> Iterator[None]:
    """Let transformers' gradient checkpointing leave the cache to the blocks: reading this one twice does no harm."""
    blocks = [
        block
        for block in model.modules()
        if getattr(block, "gradient_checkpointing", False) and "_can_checkpoint_with_cache" not in vars(block)
    ]
    try:
        for block in blocks:
            vars(block)["_can_checkpoint_with_cache"] = True
        yield
    finally:
        for block in blocks:
            vars(block).pop("_can_checkpoint_with_cache", None)
