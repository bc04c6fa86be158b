"""Attention over a packed row on a GPU: one kernel for all samples, which skips the blocks that nobody sees.

`flex_attention` (arXiv:2412.05496) is compiled by PyTorch for the mask and the score it is given. A token of a packed
row sees an unbroken run of keys around itself, so two numbers for each token, the first and the last key it sees, say
all about samples, direction and sliding window; and since they never fall, which blocks are seen follows from the first
and the last token of each block. The mask is made on the CPU, where the lengths are, and once for all layers alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from addenda.bases.fast.compiled import compiled, runs_compiled
from addenda.bases.fast.segments import Rule, Segments

__all__ = ["BLOCK", "flex_attend", "flex_takes"]

BLOCK = 128
"""Queries and keys of a block; rows are filled up to a multiple, which also keeps the number of shapes small."""

NARROWEST = 16
"""Least width of a head that the GPU's matrix units take."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flex_takes(query: Tensor, value: Tensor) -> bool:
    """Whether the compiled kernel can do this: query (heads, T, d), value (heads, T, d_v).

    A row that is not whole blocks is left out, because every length of that kind would be compiled for itself.
    """
    wide = min(query.shape[-1], value.shape[-1]) >= NARROWEST
    suits = wide and query.dtype in _DTYPES and query.shape[1] % BLOCK == 0
    return suits and runs_compiled(query)


def flex_attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """Attention within each segment, as `attend` does it; without dropout, over a row of whole blocks."""
    tokens, used = query.shape[1], sum(segments.lengths)
    seen = (tokens, rule.window, rule.causal)
    if seen not in segments.masks:
        segments.masks[seen] = _block_mask(segments, tokens, rule, query.device)
    out = _flex_on(query.device)(
        query[None],
        key[None],
        value[None],
        score_mod=None if rule.softcap is None else _capped(rule.softcap),
        block_mask=segments.masks[seen],
        scale=rule.scaling,
        enable_gqa=True,
    )[0]
    return out if used == tokens else functional.pad(out[:, :used], (0, 0, 0, tokens - used))


def _flex_on(device: torch.device) -> Callable[..., Tensor]:
    function: Any = flex_attention  # uncompiled it holds all scores, which is for tests
    return compiled(function) if device.type == "cuda" else function


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _block_mask(segments: Segments, tokens: int, rule: Rule, device: torch.device) -> BlockMask:
    first, last = _keys_seen(segments, tokens, rule)
    starts = torch.arange(0, tokens, BLOCK)[None, :]
    ends = starts + BLOCK - 1
    of_first, of_last = slice(0, None, BLOCK), slice(BLOCK - 1, None, BLOCK)
    seen = (starts <= last[of_last, None]) & (ends >= first[of_first, None])
    whole = (starts >= first[of_last, None]) & (ends <= last[of_first, None])
    from_key, to_key = first.to(device), last.to(device)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= from_key[query]) & (key <= to_key[query])

    made = BlockMask.from_kv_blocks(*_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees)
    return made.to(device)


def _keys_seen(segments: Segments, tokens: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """The first and the last key that each token sees, (tokens,) int32; tokens behind all samples see one another."""
    bounds = torch.tensor([*segments.bounds, (sum(segments.lengths), tokens)])
    starts, stops = bounds.repeat_interleave(bounds[:, 1] - bounds[:, 0], dim=0).unbind(1)
    place = torch.arange(tokens)
    first = starts if rule.window is None else torch.maximum(starts, place - rule.window + 1)
    return first.int(), (place if rule.causal else stops - 1).int()


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(queries, keys) bool -> how many keys each row has, (1, 1, queries), and all keys with those first."""
    listed = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], listed.int()[None, None]
