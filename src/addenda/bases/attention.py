"""Attention over a packed row: each sample attends to itself alone, and no T x T mask is ever built.

transformers asks a named function for its attention. `packed_attention_on` lends a model ours for the length of
a ``with`` block, so that outside it the model attends (and generates) as it always did. The sample boundaries
travel as a keyword argument of the model's forward, never as module or global state.

On the CPU the forward is PyTorch's fused kernel where that can do the work, and the backward is written out as plain
products per block of queries, which is several times faster than PyTorch's own in bf16. Nothing of size length x
length outlives a block.
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

LENGTH_MULTIPLE = 16
"""Blocks are filled up to it: on a CPU each new shape of a product costs as much as ten of a shape seen before."""

_UNSUPPORTED = ("s_aux", "position_bias", "cache")


@dataclass
class Segments:
    """Where the samples of a packed row lie; goes through the model's forward as the argument ``segments``.

    Example:
        >>> Segments((3, 2)).bounds
        ((0, 3), (3, 5))
    """

    lengths: tuple[int, ...]
    """Tokens of each sample, in order; all positive. Tokens of the row behind them belong to no sample."""
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
            hint="the model is run one sample at a time instead, without this function",
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
        segments: samples whose lengths add up to T or less; tokens behind them get zeros.
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
        return functional.pad(torch.cat(parts, dim=1), (0, 0, 0, query.shape[1] - sum(segments.lengths)))
    out: Tensor = _SegmentAttention.apply(query, key, value, (segments.bounds, rule))
    return out


def _library_attention(query: Tensor, key: Tensor, value: Tensor, rule: Rule, dropout: float) -> Tensor:
    """One segment by PyTorch alone, through its autograd."""
    hidden = _hidden(query.shape[1], 0, 0, rule, query.device)
    if rule.softcap is None:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=~hidden, dropout_p=dropout, scale=rule.scaling,
            enable_gqa=True,
        )[0]  # fmt: skip
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = torch.tanh(query @ key.transpose(1, 2) * (rule.scaling / rule.softcap)) * rule.softcap
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1, dtype=torch.float32)
    return functional.dropout(weights.to(value.dtype), dropout) @ value


def _hidden(queries: int, first_query: int, first_key: int, rule: Rule, device: torch.device) -> Tensor:
    """``(queries, keys)``: True where a query does not see a key; the last key stands where the last query does."""
    rows = torch.arange(first_query, first_query + queries, device=device)[:, None]
    columns = torch.arange(first_key, first_query + queries, device=device)[None, :]
    hidden = columns > rows
    if rule.window is not None:
        hidden |= columns <= rows - rule.window
    return hidden


class _SegmentAttention(torch.autograd.Function):
    """Attention on the CPU; saves query, key, value, output and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        bounds, rule = plan
        heads, tokens, _ = query.shape
        out = query.new_zeros(tokens, heads, value.shape[-1]).transpose(0, 1)
        log_sums = query.new_zeros(heads, tokens, dtype=_wide(query))
        for start, end in bounds:
            whole = slice(start, end)
            if _flash_can(rule, end - start, key, value):
                out[:, whole], log_sums[:, whole] = _flash(
                    query[:, whole], key[:, whole], value[:, whole], rule
                )
                continue
            for keys, first, stop in _blocks(start, end, rule.window):
                now, seen = slice(first, stop), slice(keys, stop)
                scores = _scores(_group(query[:, now] * rule.scaling, len(key)), key[:, seen], rule).to(
                    _wide(query)
                )
                hidden = _hidden(stop - first, first, keys, rule, query.device)
                scores = scores.view(heads, stop - first, -1).masked_fill_(hidden, -torch.inf)
                log_sums[:, now] = scores.logsumexp(-1)
                weights = (scores - log_sums[:, now, None]).exp_().to(value.dtype)
                out[:, now] = _ungroup(_group(weights, len(key)) @ value[:, seen], heads)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With P the weights and g the gradient of the output: dV = Pᵀg, dS = P (gVᵀ - g·out), dQ = dS K, dK = dSᵀQ."""
        query, key, value, out, log_sums = ctx.saved_tensors
        (grad,) = grads
        bounds, rule = ctx.plan
        mean = (grad * out).sum(-1, dtype=_wide(query))
        scaled = query * rule.scaling
        # Both subtractions ride along in the products, as further columns: a pass over the scores costs as much.
        queries = scaled if rule.softcap else _with_column(scaled, -log_sums)
        keys_ = key if rule.softcap else _with_ones(key)
        grads_, values = _with_column(grad, -mean), _with_ones(value)
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        d_k, d_v = key.shape[-1], value.shape[-1]
        for keys, first, stop in (span for start, end in bounds for span in _blocks(start, end, rule.window)):
            now, seen = slice(first, stop), slice(keys, stop)
            # What fills a block up has zeros for a query and for the gradient of its output, so it adds nothing.
            q, g = (_group(_filled(x[:, now]), len(key)) for x in (queries, grads_))
            k, v = _filled(keys_[:, seen]), _filled(values[:, seen])
            weights, slope = _weights(
                _scores(q, k, rule), _filled(log_sums[:, now, None]), first - keys, rule
            )
            inner = (g @ v.transpose(1, 2)).mul_(weights)
            if slope is not None:
                inner.mul_(slope)
            grad_query[:, now] = _ungroup(inner @ k[..., :d_k], len(query))[:, : stop - first]
            grad_key[:, seen] += (inner.transpose(1, 2) @ q[..., :d_k])[:, : stop - keys]
            grad_value[:, seen] += (weights.transpose(1, 2) @ g[..., :d_v])[:, : stop - keys]
        return grad_query.mul_(rule.scaling), grad_key, grad_value, None


_Plan = tuple[tuple[tuple[int, int], ...], Rule]
"""Bounds of the segments, and the rule of the layer."""


def _flash_can(rule: Rule, length: int, key: Tensor, value: Tensor) -> bool:
    seen_whole = rule.window is None or length <= rule.window
    return rule.softcap is None and seen_whole and key.shape[-1] == value.shape[-1]


def _flash(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the scores, by the kernel that scaled_dot_product_attention itself uses here."""
    out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, True, scale=rule.scaling
    )
    return out[0], log_sums[0]


def _blocks(start: int, end: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Cut one segment into (first key, first query, end of queries)."""
    for first in range(start, end, QUERY_BLOCK):
        keys = start if window is None else max(start, first - window + 1)
        yield keys, first, min(end, first + QUERY_BLOCK)


def _scores(query: Tensor, key: Tensor, rule: Rule) -> Tensor:
    scores = torch.bmm(query, key.transpose(1, 2))
    return scores if rule.softcap is None else scores.div_(rule.softcap).tanh_().mul_(rule.softcap)


def _weights(scores: Tensor, log_sums: Tensor, offset: int, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Turn scores (less their log-sum-exp where nothing was capped) into weights and the slope of the cap."""
    slope = None
    if rule.softcap is not None:
        slope = 1 - (scores / rule.softcap).square_()
        scores = (scores - log_sums.reshape(len(scores), -1, 1)).to(scores.dtype)
    weights = scores.exp_()
    triangle = weights.view(*log_sums.shape[:2], -1).tril_(offset)
    if rule.window is not None:
        triangle.triu_(offset - rule.window + 1)
    return weights, slope


def _group(x: Tensor, key_value_heads: int) -> Tensor:
    """``(heads, n, d)`` as ``(key_value_heads, group * n, d)``: heads that share a key lie together."""
    return x.reshape(key_value_heads, -1, x.shape[-1])


def _filled(x: Tensor) -> Tensor:
    """``(heads, n, d)`` with zeros behind, n up to the next multiple."""
    return functional.pad(x, (0, 0, 0, -x.shape[1] % LENGTH_MULTIPLE))


def _ungroup(x: Tensor, heads: int) -> Tensor:
    return x.view(heads, -1, x.shape[-1])


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    """Append a wide ``(heads, T)`` column to ``(heads, T, d)`` in x's dtype, as its leading part and the rest."""
    leading = column.to(x.dtype)
    return torch.cat((x, leading[..., None], (column - leading).to(x.dtype)[..., None]), dim=-1)


def _with_ones(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 2), value=1.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
