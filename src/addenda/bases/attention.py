"""Attention over a packed row: each sample attends to itself alone, and no T x T mask is ever built.

transformers asks a named function for its attention. `packed_attention_on` lends a model ours for the length of
a ``with`` block, so that outside it the model attends (and generates) as it always did. The sample boundaries
travel as a keyword argument of the model's forward, never as module or global state.

On the CPU the forward is PyTorch's fused kernel where that can do the work, and the backward is written out as
plain products per block of queries: PyTorch's own bf16 backward takes fifteen times its forward there, the
products four times. Nothing of size length x length outlives a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from addenda.errors import BaseModelError

__all__ = ["ATTENTION", "Rule", "Segments", "attend", "packed_attention", "packed_attention_on"]

ATTENTION = "addenda_packed"
"""The name our function has in transformers' table of attention functions."""

QUERY_BLOCK = 512
"""Queries per block: bounds the scores held at once to heads x 512 x length."""

_UNSUPPORTED = ("s_aux", "position_bias", "cache")


@dataclass
class Segments:
    """Where the samples of a packed row lie; goes through the model's forward as the argument ``segments``.

    Example:
        >>> Segments((3, 2)).bounds
        ((0, 3), (3, 5))
    """

    lengths: tuple[int, ...]
    """Tokens of each sample, in order; all positive."""
    windows: set[int | None] = field(default_factory=set)
    """Sliding windows the layers asked for, collected while they ran."""

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each sample in the row."""
        ends = tuple(itertools.accumulate(self.lengths))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))


@dataclass(frozen=True)
class Rule:
    """How scores become probabilities in one layer."""

    scaling: float
    """Factor on the products of queries and keys."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` before it; None for no limit."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(scores / softcap)``; None leaves them."""

    @property
    def plain(self) -> bool:
        """Whether scores are scaled and nothing else."""
        return self.window is None and self.softcap is None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it, over one packed row.

    Args:
        module: the attention layer; only its ``is_causal`` is read.
        query: ``(1, heads, T, d)``.
        key: ``(1, key_value_heads, T, d)``.
        value: ``(1, key_value_heads, T, d_v)``.
        attention_mask: must be None; causality and `segments` say all.
        scaling: factor on the scores; None means ``d ** -0.5``.
        dropout: probability of dropping an attention weight.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None means no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None means as they are.
        segments: the samples of the row.
        is_causal: overrides the layer's own.
        others: arguments of other attention functions; those that would change the result are refused.

    Returns:
        ``(1, T, heads, d_v)`` and None (no attention weights).

    Raises:
        BaseModelError: the layer asks for something this function does not do.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    problems = [f"'{name}'" for name in _UNSUPPORTED if others.get(name) is not None]
    problems += ["an attention mask"] if attention_mask is not None else []
    problems += [] if causal else ["attention that is not causal"]
    if segments is None or problems:
        problems += ["no sample boundaries"] if segments is None else []
        raise BaseModelError(
            f"packed attention cannot do what {type(module).__name__} asks for",
            where={"asked for": ", ".join(problems)},
        )
    segments.windows.add(sliding_window)
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    out = attend(query[0], key[0], value[0], segments, rule, dropout=dropout)
    return out.transpose(0, 1).unsqueeze(0), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule, *, dropout: float = 0.0
) -> Tensor:
    """Causal attention within each segment.

    Args:
        query: ``(heads, T, d)``.
        key: ``(key_value_heads, T, d)``; ``heads`` is a multiple of ``key_value_heads``.
        value: ``(key_value_heads, T, d_v)``.
        segments: samples whose lengths add up to T.
        rule: scaling, window and softcap.
        dropout: probability of dropping a weight; above 0 PyTorch's autograd does the backward.

    Returns:
        ``(heads, T, d_v)``.
    """
    if dropout or query.device.type != "cpu":
        parts = [
            _library_attention(query[:, a:b], key[:, a:b], value[:, a:b], rule, dropout)
            for a, b in segments.bounds
        ]
        return torch.cat(parts, dim=1)
    out: Tensor = _SegmentAttention.apply(query, key, value, (segments.bounds, rule))
    return out


def _library_attention(query: Tensor, key: Tensor, value: Tensor, rule: Rule, dropout: float) -> Tensor:
    """One segment by PyTorch alone, through its autograd."""
    length = query.shape[1]
    if rule.softcap is None:
        mask = None if rule.window is None else _bias(length, 0, 0, rule, query) == 0
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
            scale=rule.scaling, enable_gqa=True,
        )[0]  # fmt: skip
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = torch.tanh(query @ key.transpose(1, 2) * (rule.scaling / rule.softcap)) * rule.softcap
    weights = torch.softmax(scores + _bias(length, 0, 0, rule, query), dim=-1, dtype=torch.float32)
    return functional.dropout(weights.to(value.dtype), dropout) @ value


def _bias(queries: int, query_start: int, key_start: int, rule: Rule, like: Tensor) -> Tensor:
    """``(queries, keys)``: 0 where a query sees a key, minus infinity elsewhere; keys end with the last query."""
    rows = torch.arange(query_start, query_start + queries, device=like.device)[:, None]
    columns = torch.arange(key_start, query_start + queries, device=like.device)[None, :]
    hidden = columns > rows
    if rule.window is not None:
        hidden |= columns <= rows - rule.window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def _blocks(start: int, end: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Cut one segment into (first key, first query, end of queries)."""
    for first in range(start, end, QUERY_BLOCK):
        keys = start if window is None else max(start, first - window + 1)
        yield keys, first, min(end, first + QUERY_BLOCK)


_Plan = tuple[tuple[tuple[int, int], ...], Rule]
"""Bounds of the segments, and the rule of the layer."""


class _SegmentAttention(torch.autograd.Function):
    """Attention whose backward is a handful of products per block; saves query, key, value and output only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        bounds, rule = plan
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[-1]).transpose(0, 1)
        for start, end in bounds:
            if rule.plain:
                out[:, start:end] = _library_attention(
                    query[:, start:end], key[:, start:end], value[:, start:end], rule, 0.0
                )
                continue
            for keys, first, stop in _blocks(start, end, rule.window):
                block = _Block.of(query[:, first:stop], key[:, keys:stop], first - keys, rule)
                out[:, first:stop] = _ungroup(block.weights @ value[:, keys:stop], heads)
        ctx.save_for_backward(query, key, value, out)
        ctx.bounds, ctx.rule = bounds, rule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        (grad_out,) = grads
        spans = [span for start, end in ctx.bounds for span in _blocks(start, end, ctx.rule.window)]
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for keys, first, stop in spans:
            block = _Block.of(query[:, first:stop], key[:, keys:stop], first - keys, ctx.rule)
            grad = _group(grad_out[:, first:stop], key.shape[0])
            mean = (grad * _group(out[:, first:stop], key.shape[0])).sum(-1, keepdim=True)
            grad_value[:, keys:stop] += block.weights.transpose(1, 2) @ grad
            grad_scores = (grad @ value[:, keys:stop].transpose(1, 2)).sub_(mean).mul_(block.weights)
            if block.slope is not None:
                grad_scores.mul_(block.slope)
            grad_scores.mul_(ctx.rule.scaling)
            grad_query[:, first:stop] = _ungroup(grad_scores @ key[:, keys:stop], query.shape[0])
            grad_key[:, keys:stop] += grad_scores.transpose(1, 2) @ block.query
        return grad_query, grad_key, grad_value, None


@dataclass
class _Block:
    """The attention weights of one block of queries."""

    query: Tensor
    """``(key_value_heads, group * queries, d)``."""
    weights: Tensor
    """``(key_value_heads, group * queries, keys)``, rows sum to 1."""
    slope: Tensor | None
    """Derivative of the soft cap at each score, or None without one."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, offset: int, rule: Rule) -> _Block:
        """Weights of `query` over `key`, the first query standing `offset` places after the first key."""
        queries = query.shape[1]
        grouped = _group(query, key.shape[0])
        scores = (grouped @ key.transpose(1, 2)).mul_(rule.scaling)
        slope = None
        if rule.softcap is not None:
            capped = scores.div_(rule.softcap).tanh_()
            slope = 1 - capped * capped
            scores = capped * rule.softcap
        bias = _bias(queries, offset, 0, rule, query)
        scores.view(key.shape[0], -1, queries, key.shape[1]).add_(bias)
        return cls(grouped, torch.softmax(scores, dim=-1), slope)


def _group(x: Tensor, key_value_heads: int) -> Tensor:
    """``(heads, n, d)`` as ``(key_value_heads, group * n, d)``: heads that share a key lie together."""
    return x.reshape(key_value_heads, -1, x.shape[-1])


def _ungroup(x: Tensor, heads: int) -> Tensor:
    return x.view(heads, -1, x.shape[-1])


@contextmanager
def packed_attention_on(model: nn.Module) -> Iterator[None]:
    """Let `model` (a transformers model) attend by `packed_attention` within the block.

    Every configuration inside the model is switched and put back, also when the block raises.
    """
    from transformers import AttentionInterface

    # Not registered as a mask function: transformers then builds no mask at all for it.
    AttentionInterface.register(ATTENTION, packed_attention)
    configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    former = [
        (config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")
    ]
    try:
        for config, _ in former:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, implementation in former:
            config._attn_implementation = implementation
