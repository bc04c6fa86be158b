"""The twin of the attention kernel: plain products per block of queries, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from addenda.bases.fast.segments import Rule

__all__ = ["Plan", "hidden_keys", "plain_backward", "plain_forward"]

QUERY_BLOCK = 512
"""Queries per block: bounds the scores held at once to heads x 512 x length."""

LENGTH_MULTIPLE = 16
"""Blocks are filled up to it: on a CPU each new shape of a product costs as much as ten of a shape seen before."""


Plan = tuple[tuple[tuple[int, int], ...], Rule]
"""Bounds of the segments, and the rule of the layer."""


def hidden_keys(queries: int, first_query: int, first_key: int, rule: Rule, device: torch.device) -> Tensor:
    """``(queries, keys)``: True where a query does not see a key; the last key stands where the last query does."""
    rows = torch.arange(first_query, first_query + queries, device=device)[:, None]
    columns = torch.arange(first_key, first_query + queries, device=device)[None, :]
    hidden = columns > rows if rule.causal else torch.zeros_like(columns > rows)
    if rule.window is not None:
        hidden |= columns <= rows - rule.window
    return hidden


def plain_forward(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The output ``(heads, T, d_v)`` and the log-sum-exps of the scores ``(heads, T)``."""
    bounds, rule = plan
    heads, tokens, _ = query.shape
    out = query.new_zeros(tokens, heads, value.shape[-1]).transpose(0, 1)
    log_sums = query.new_zeros(heads, tokens, dtype=_wide(query))
    for start, end in bounds:
        whole = slice(start, end)
        if _flash_can(rule, end - start, key, value):
            out[:, whole], log_sums[:, whole] = _flash(query[:, whole], key[:, whole], value[:, whole], rule)
            continue
        for block in _blocks(start, end, rule):
            now, seen = slice(block.first, block.stop), slice(block.first_key, block.last_key)
            scores = _scores(_group(query[:, now] * rule.scaling, len(key)), key[:, seen], rule)
            scores = scores.to(_wide(query)).view(heads, block.stop - block.first, -1)
            if rule.causal or rule.window is not None:
                hidden = hidden_keys(
                    block.stop - block.first, block.first, block.first_key, rule, query.device
                )
                scores.masked_fill_(hidden, -torch.inf)
            log_sums[:, now] = scores.logsumexp(-1)
            weights = (scores - log_sums[:, now, None]).exp_().to(value.dtype)
            out[:, now] = _ungroup(_group(weights, len(key)) @ value[:, seen], heads)
    return out, log_sums


def plain_backward(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, grad: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the weights and g the gradient of the output: dV = Pᵀg, dS = P (gVᵀ - g·out), dQ = dS K, dK = dSᵀQ."""
    bounds, rule = plan
    mean = (grad * out).sum(-1, dtype=_wide(query))
    scaled = query * rule.scaling
    # Both subtractions ride along in the products, as further columns: a pass over the scores costs as much.
    queries = scaled if rule.softcap else _with_column(scaled, -log_sums)
    keys_ = key if rule.softcap else _with_ones(key)
    grads_, values = _with_column(grad, -mean), _with_ones(value)
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    d_k, d_v = key.shape[-1], value.shape[-1]
    for block in (block for start, end in bounds for block in _blocks(start, end, rule)):
        now, seen = slice(block.first, block.stop), slice(block.first_key, block.last_key)
        # What fills a block up has zeros for a query and for the gradient of its output, so it adds nothing.
        q, g = (_group(_filled(x[:, now]), len(key)) for x in (queries, grads_))
        k, v = _filled(keys_[:, seen]), _filled(values[:, seen])
        weights, slope = _weights(
            _scores(q, k, rule), _filled(log_sums[:, now, None]), block.first - block.first_key, rule
        )
        inner = (g @ v.transpose(1, 2)).mul_(weights)
        if slope is not None:
            inner.mul_(slope)
        queries_here, keys_here = block.stop - block.first, block.last_key - block.first_key
        grad_query[:, now] = _ungroup(inner @ k[..., :d_k], len(query))[:, :queries_here]
        grad_key[:, seen] += (inner.transpose(1, 2) @ q[..., :d_k])[:, :keys_here]
        grad_value[:, seen] += (weights.transpose(1, 2) @ g[..., :d_v])[:, :keys_here]
    return grad_query.mul_(rule.scaling), grad_key, grad_value


def _flash_can(rule: Rule, length: int, key: Tensor, value: Tensor) -> bool:
    seen_whole = rule.window is None or length <= rule.window
    return rule.softcap is None and seen_whole and key.shape[-1] == value.shape[-1]


def _flash(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the scores, by the kernel that scaled_dot_product_attention itself uses here."""
    out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, rule.causal, scale=rule.scaling
    )
    return out[0], log_sums[0]


class _Block(NamedTuple):
    """Queries ``first`` to ``stop`` and all keys that any of them sees."""

    first_key: int
    last_key: int
    first: int
    stop: int


def _blocks(start: int, end: int, rule: Rule) -> Iterator[_Block]:
    for first in range(start, end, QUERY_BLOCK):
        stop = min(end, first + QUERY_BLOCK)
        first_key = start if rule.window is None else max(start, first - rule.window + 1)
        yield _Block(first_key, stop if rule.causal else end, first, stop)


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
    triangle = weights.view(*log_sums.shape[:2], -1)
    if rule.causal:
        triangle.tril_(offset)
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
