"""A causal model as a function of tensors alone, its key-value cache among them: what a graph can be traced from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from addenda.errors import BaseModelError

__all__ = ["CachedDecoder", "StaticDecoder", "cache_shapes", "keeps_keys"]


class CachedDecoder(nn.Module):
    """Runs some tokens of a batch given the keys and values of those before them.

    Every layer's cache holds all tokens; where a layer attends to a window of them, the mask says so.

    Args:
        model: a causal language model in evaluation mode, adapters included.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.eval()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return logits (batch, length, vocabulary), then keys and values of each layer with the new tokens' added.

        Args:
            values: the new tokens' ids (batch, length); a mask (batch, past + length), 1 where there is a token and
                0 where there is padding; the new tokens' places (batch, length), where the model takes such; then
                keys and values of each layer in turn, (batch, heads, past, features).
        """
        input_ids, attention_mask, *rest = values
        given: dict[str, Any] = {}
        if self.takes_positions:
            given["position_ids"] = rest.pop(0)
        cache = DynamicCache(list(zip(rest[::2], rest[1::2], strict=True)))
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
        )
        return (output.logits, *_tensors(output.past_key_values))


class StaticDecoder(nn.Module):
    """Runs some tokens of one sequence with a cache of a fixed length, which its buffers hold from call to call.

    What was kept for tokens at later places than those of a call is not attended to: place 0 begins a new sequence.

    Args:
        model: a causal language model in evaluation mode, adapters included.
        context: tokens that the cache holds.

    Raises:
        BaseModelError: it keeps no key-value cache.
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        super().__init__()
        self.model, self.layers = model, 0
        self._cut = "logits_to_keep" in inspect.signature(model.forward).parameters
        for number, shapes in enumerate(cache_shapes(model)):
            for part, (heads, features) in zip(("key", "value"), shapes, strict=True):
                kept = torch.zeros(1, heads, context, features, device=next(model.parameters()).device)
                self.register_buffer(f"{part}_{number}", kept, persistent=False)
            self.layers = number + 1
        self.eval()

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Return the logits (1, 1, vocabulary) after the last of the tokens.

        Args:
            input_ids: the tokens (1, n), of type int64.
            cache_position: their places in the sequence (n,), one after another.
        """
        kept = [
            _Kept(self.get_buffer(f"key_{number}"), self.get_buffer(f"value_{number}"), cache_position)
            for number in range(self.layers)
        ]
        given = {"logits_to_keep": 1} if self._cut else {}
        output = self.model(
            input_ids=input_ids,
            position_ids=cache_position[None],
            past_key_values=Cache(layers=kept),
            use_cache=True,
            **given,
        )
        logits: Tensor = output.logits[:, -1:]
        return logits


class _Kept(StaticLayer):
    """Keys and values of one layer (1, heads, context, features), written at the places of a call's tokens."""

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.places = keys, values, places
        self.cumulative_length, self.device, self.is_initialized = places[0], keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            torch.ops.aten.index_put_(kept, [None, None, self.places], new)
        return self.keys, self.values


def keeps_keys(model: nn.Module) -> bool:
    """Return whether a causal model keeps a key and a value for each token, as far as its configuration tells."""
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers)


def cache_shapes(model: nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return (heads, features) of the keys and of the values that each layer keeps for a token, in their order.

    Raises:
        BaseModelError: it keeps no cache, or one that is not a key and a value for each token.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    found = []
    with torch.no_grad():
        for length in (1, 2):
            output = model(input_ids=ids[:, :length], use_cache=True)
            found.append([tuple(t.shape) for t in _tensors(getattr(output, "past_key_values", None))])
    grown = [(*shape[:2], shape[2] + 1, *shape[3:]) for shape in found[0] if len(shape) == 4]
    if not found[1] or grown != found[1]:
        raise BaseModelError(
            f"{type(model).__name__} keeps no key and value for each token that it has read",
            hint="a decoder needs a key-value cache of attention layers; others can be run whole, without one",
        )
    kept = [(shape[1], shape[3]) for shape in found[1]]
    return list(zip(kept[::2], kept[1::2], strict=True))


def _tensors(cache: Any) -> list[Tensor]:
    """Return keys and values of each layer in turn; nothing where a layer keeps something else."""
    kept = [
        getattr(layer, part, None) for layer in getattr(cache, "layers", ()) for part in ("keys", "values")
    ]
    found = [tensor for tensor in kept if isinstance(tensor, Tensor)]
    return found if len(found) == len(kept) else []
