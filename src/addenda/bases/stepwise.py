"""A causal model as a function of tensors alone, its key-value cache among them: what a graph can be traced from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from addenda.errors import BaseModelError

__all__ = ["CachedDecoder", "cache_shapes"]


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
