"""A look ahead: the hidden states of a pass before the one that counts, for adapters that decide by them.

A watch on the model's decoder runs each pass twice. In the first one the adapters that look ahead do as they do without
knowing anything; what it ends in is theirs in the second. Of a sequence that goes on, the first passes have a cache of
their own, kept on the caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from addenda.errors import MethodError

if TYPE_CHECKING:
    from addenda.core.host import Selection

__all__ = ["Preview"]

_KEPT = "_addenda_first_passes"
_REARRANGING = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop")


class Preview:
    """Runs each pass through a model's decoder, or through the model where it has none, once beforehand.

    Args:
        model: gives hidden states, as a tensor, first of several things, or as ``last_hidden_state``.
        selection: what runs on the model; there is a first pass only where an adapter that looks ahead does.
    """

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        self._selection = selection
        self.names: set[str] = set()
        """Names of the adapters that look ahead."""
        self.states: Tensor | None = None
        """(rows, tokens, width): the last hidden states of the first pass, which no gradient goes through; None
        within it."""
        self.findings: dict[Hashable, Any] = {}
        """What an adapter worked out of them and the others need not."""
        self.first = False
        """Whether the first pass runs."""
        self._keeping = False
        self._cache: Any = None
        find = getattr(model, "get_decoder", None)
        decoder = (find() if find is not None else None) or model
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Look ahead no more."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep to the states that there are within the block."""
        before, self._keeping = self._keeping, True
        try:
            yield
        finally:
            self._keeping = before

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.first or self._keeping:
            return
        self.states, self.findings, self._cache = None, {}, None
        if self.names.isdisjoint(self._selection.composition.names):
            return
        given = {**kwargs, "return_dict": True} if "return_dict" in kwargs else dict(kwargs)
        if given.get("past_key_values") is not None:
            given["past_key_values"] = _first_cache_of(given["past_key_values"])
        self.first = True
        try:
            with torch.no_grad():
                output = decoder(*args, **given)
        finally:
            self.first = False
        self._cache = getattr(output, "past_key_values", None)
        self.states = _states_of(output).detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, decoder: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self.first or self._keeping or self._cache is None:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None and getattr(cache, _KEPT, None) is None:
            setattr(cache, _KEPT, self._cache)
            for name in _REARRANGING:
                if hasattr(cache, name):
                    setattr(cache, name, _refuse_rearranging)
        self._cache = None


def _first_cache_of(cache: Any) -> Any:
    """The cache of the first passes of the sequence that this one holds."""
    found = getattr(cache, _KEPT, None)
    if found is None and cache.get_seq_length():
        raise MethodError(
            "the cache was filled without the first passes that an adapter looks ahead by",
            hint="fill it while the adapter is active, or call the model with use_cache=False",
        )
    return copy.deepcopy(cache) if found is None else found


def _refuse_rearranging(*_: object, **__: object) -> None:
    raise MethodError(
        "the rows of a cache cannot be rearranged while an adapter looks ahead: those of its first passes would not be",
        hint="search without beams, or call the model with use_cache=False",
    )


def _states_of(output: Any) -> Tensor:
    found: object = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise MethodError(
            f"the model's first pass gave no hidden states, but a {type(output).__name__}",
            hint="attach to a model whose decoder returns its last hidden states",
        )
    return found
