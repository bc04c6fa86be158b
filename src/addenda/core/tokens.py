"""The token ids of the pass that runs, for adapters whose part in it depends on them.

A layer sees features, not tokens. A watch on the model's decoder notes what it is called with, and with which cache: in
generation a pass brings one token a row, and the ids before it are those of the passes that filled the cache. They are
kept on the cache itself, so that a copy of a cache, as for a common beginning of prompts, has them too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNKNOWN", "TokenWatch", "Tokens"]

UNKNOWN = -1
"""Stands for a token that the cache holds from before there was a watch."""
_KEPT = "_addenda_ids"


@dataclass(frozen=True)
class Tokens:
    """What one pass is about."""

    ids: Tensor
    """(rows, seen): the ids in the cache, then those of this pass."""
    samples: Tensor
    """(rows, seen): the number of the sample a token belongs to, from 0; a packed row holds several."""
    new: int
    """How many ids of a row are of this pass."""
    findings: dict[Hashable, Any] = field(default_factory=dict)
    """What one layer worked out and the others need not."""


class TokenWatch:
    """Notes the ids of every pass through a model's decoder, or through the model where it has none.

    Args:
        model: called with ``input_ids``, by name or first, of shape (rows, tokens).
    """

    def __init__(self, model: nn.Module) -> None:
        find = getattr(model, "get_decoder", None)
        decoder = (find() if find is not None else None) or model
        self.current: Tokens | None = None
        """The pass that runs, or ran last; None where it was given no ids."""
        self.probing = False
        """Whether a probe asks what every adapter does, whatever the ids."""
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def kept(self, *, probing: bool = False) -> Iterator[None]:
        """Keep to the pass that is current within the block, or probe in it."""
        before = self.current, self.probing
        self.probing = probing
        try:
            yield
        finally:
            self.current, self.probing = before

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            self.current = None
            return
        past = _past_of(kwargs.get("past_key_values"), ids)
        seen = torch.cat([past, ids], dim=1)
        self.current = Tokens(seen, _samples(seen, kwargs.get("position_ids")), ids.shape[1])

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None and self.current is not None and not isinstance(cache, tuple):
            setattr(cache, _KEPT, self.current.ids)


def _past_of(cache: Any, ids: Tensor) -> Tensor:
    """The ids (rows, n) of what a cache holds."""
    held = 0 if cache is None else int(cache.get_seq_length())
    known: Tensor = getattr(cache, _KEPT, ids[:, :0])
    if len(known) != len(ids):  # its rows were chosen or repeated
        known = ids[:, :0]
    known = known[:, :held]
    return torch.cat([known.new_full((len(ids), held - known.shape[1]), UNKNOWN), known], dim=1)


def _samples(seen: Tensor, positions: object) -> Tensor:
    """The sample of each token: a new one begins where positions do not go on."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != seen.shape[1]:
        return torch.zeros_like(seen)
    begins = torch.zeros_like(positions)
    begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    return begins.cumsum(dim=1).expand_as(seen)
