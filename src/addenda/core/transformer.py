"""Transformers and their attention as layers of a kind: what a sequence adapter sees of them.

They are recognised by what they take and hold, because the core does not import transformers.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from addenda.core.blocks import WeightlessView
from addenda.core.mirror import along, blocks_of, make_mirror, mirrored, with_room
from addenda.core.prefix_cache import PrefixCache, cached_blocks
from addenda.core.sequence import Attention, Inject, Inputs, Transformer, Update, keeps
from addenda.core.views import LayerView

__all__ = ["AttentionView", "TransformerView", "is_attention", "is_transformer"]


def is_transformer(module: nn.Module) -> bool:
    """Whether a module takes token ids or embeddings and gives hidden states, without a head on top."""
    config = getattr(module, "config", None)
    if (
        config is None
        or not hasattr(module, "get_input_embeddings")
        or getattr(config, "is_encoder_decoder", False)
    ):
        return False
    if getattr(module, "base_model", None) is not module:
        return False
    original: Any = getattr(type(module), "original_class", type(module))
    taken = inspect.signature(original.forward).parameters
    if not {"input_ids", "inputs_embeds"} <= taken.keys() or _embedding_of(module) is None:
        return False
    # Of a model that puts pictures among the tokens, it is the language model inside.
    return not any(is_transformer(part) for part in module.modules() if part is not module)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is self-attention with projections of its own for queries, keys, values and output."""
    parts = dict(module.named_children())
    projected = all(
        hasattr(parts.get(name), "in_features") for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    return projected and hasattr(module, "head_dim") and getattr(module, "is_causal", False)


def _embedding_of(module: Any) -> nn.Module | None:
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if hasattr(found, "embedding_dim") else None


class _CalledView(WeightlessView):
    """A module that is called with arguments by name, and has no single weight."""

    writable = False
    instead = "changes the sequence"

    def received(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, LayerView]:
        bound = inspect.signature(self.original.forward).bind(self.module, *args, **kwargs).arguments
        named = dict(list(bound.items())[1:])
        named.update(named.pop("kwargs", {}))
        cache = named.get("past_key_values")
        return Inputs(named, begins=cache is None or not cache.get_seq_length()), self

    def __call__(self, x: Any) -> Any:
        return self.original.forward(self.module, **x.given)

    @property
    def d_in(self) -> int:
        return self.width

    @property
    def d_out(self) -> int:
        return self.width

    @property
    @abstractmethod
    def width(self) -> int:
        """Features of a hidden state."""


class TransformerView(_CalledView, Transformer):
    """The transformer of a transformers model."""

    kind = called = "transformer"

    def __call__(self, x: Any) -> Any:
        lent = isinstance(x.given.get("past_key_values"), PrefixCache)
        with cached_blocks(self.module) if lent else contextlib.nullcontext():
            return super().__call__(x)

    @property
    def _embedding(self) -> Any:
        return self.module.get_input_embeddings()

    @property
    def _config(self) -> Any:
        config = self.module.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def width(self) -> int:
        return int(self._embedding.embedding_dim)

    @property
    def vocabulary(self) -> int:
        return int(self._embedding.num_embeddings)

    @property
    def layers(self) -> int:
        return int(self._config.num_hidden_layers)

    @property
    def key_value_heads(self) -> int:
        grouped = getattr(self._config, "num_key_value_heads", None)
        return int(grouped or self._config.num_attention_heads)

    @property
    def head_width(self) -> int:
        own = getattr(self._config, "head_dim", None)
        return int(own or self._config.hidden_size // self._config.num_attention_heads)

    @property
    def caches(self) -> bool:
        return bool(getattr(self._config, "use_cache", False))

    @property
    def device(self) -> torch.device:
        return next(self._tensors()).device

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.float32)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._embedding.parameters()
        yield from self._embedding.buffers()
        yield from self.module.parameters()

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self._embedding(ids)
        return found

    def recall(self, ids: Tensor) -> Tensor:
        empty = torch.empty(self.states, device=self.device, dtype=self.dtype)[..., None, :][..., :0, :]
        cache = PrefixCache(empty, keeps=True)
        self.original.forward(self.module, input_ids=ids[None], past_key_values=cache)
        return cache.kept(self.layers)

    def mirror(self, layers: int) -> nn.Module:
        return make_mirror(self.module, layers, self)

    def mirrored(self, mirror: nn.Module, inputs: Inputs) -> tuple[Inputs, Tensor]:
        ids, embedded = inputs.given.get("input_ids"), inputs.given.get("inputs_embeds")
        inputs = with_room(mirror, self.module, inputs, keeps=keeps(self, inputs))
        embedded = self.embed(cast(Tensor, ids)) if embedded is None else embedded
        return inputs, mirrored(mirror, self.module, inputs, embedded)

    def along(self, state: Tensor, inject: Inject, update: Update) -> AbstractContextManager[None]:
        return along(blocks_of(self.module), state, inject, update)


class AttentionView(_CalledView, Attention):
    """The self-attention of a transformers model."""

    kind = called = "attention"

    @property
    def width(self) -> int:
        return int(self.module.q_proj.in_features)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors())).device

    @property
    def dtype(self) -> torch.dtype:
        packed = getattr(self.module.q_proj, "compute_dtype", None)
        if isinstance(packed, torch.dtype):
            return packed
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.float32)

    def _tensors(self) -> list[Tensor]:
        projection = self.module.q_proj
        return [*projection.parameters(recurse=False), *projection.buffers(recurse=False)]

    def queries(self, inputs: Inputs) -> Tensor:
        hidden = inputs.given["hidden_states"]
        query = self._heads(self.module.q_proj(hidden))
        if (norm := getattr(self.module, "q_norm", None)) is not None:
            query = norm(query)
        query = query.transpose(1, 2)
        positions: Any = inputs.given.get("position_embeddings")
        return query if positions is None else _turned(query, *positions)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._heads(self.module.k_proj(states)), self._heads(self.module.v_proj(states))
        if (norm := getattr(self.module, "k_norm", None)) is not None:
            keys = norm(keys)
        shared = self.module.q_proj.out_features // self.module.k_proj.out_features
        both = (part.transpose(0, 1).repeat_interleave(shared, 0) for part in (keys, values))
        keys, values = both
        return keys, values

    def finish(self, read: Tensor) -> Tensor:
        out: Tensor = self.module.o_proj(read.transpose(1, 2).flatten(2))
        return out

    @property
    def scaling(self) -> float:
        return float(getattr(self.module, "scaling", self.module.head_dim**-0.5))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.module.head_dim)


def _turned(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions ``(B, T, width)`` to ``(B, heads, T, head_width)``, to the first ``width`` features."""
    cos, sin, width = cos[:, None], sin[:, None], cos.shape[-1]
    part, rest = query[..., :width], query[..., width:]
    first, second = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
