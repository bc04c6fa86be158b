"""Attention over a packed row: each sample attends to itself alone, and no T x T mask is ever built.

transformers asks a named function for its attention. `packed_attention_on` lends a model ours for the length of
a ``with`` block, so that outside it the model attends (and generates) as it always did. The sample boundaries
travel as a keyword argument of the model's forward, never as module or global state.

On the CPU a kernel of this package does forward and backward, rotary positions included. Its twin takes PyTorch's fused
kernel for the forward where that can do the work, and plain products per block of queries for the backward. Nothing of
size length x length outlives a block. On a GPU `flex` does the work, and where it cannot, PyTorch sample by sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from addenda.bases.fast.flex import flex_attend, flex_takes
from addenda.bases.fast.plain_attention import Plan, hidden_keys, plain_backward, plain_forward
from addenda.bases.fast.segments import Rotary, Rule, Segments, turned
from addenda.core.sequence import interleaved
from addenda.errors import BaseModelError
from addenda.kernels import calls

__all__ = ["ATTENTION", "attend", "packed_attention", "packed_attention_on"]

ATTENTION = "addenda_packed"
"""The name our function has in transformers' table of attention functions."""

_UNSUPPORTED = ("s_aux", "position_bias", "cache")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
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
        key: ``(1, key_value_heads, T, d)``. What there is more of them than queries stands before every sample.
        value: ``(1, key_value_heads, T, d_v)``, likewise.
        attention_mask: None, or the samples of the row in its place: any other function refuses those.
        scaling: factor on the scores; None means ``d ** -0.5``.
        dropout: probability of dropping an attention weight.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None means no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None means as they are.
        segments: the samples of the row, where they are not given in the place of the mask.
        is_causal: overrides the layer's own.
        others: arguments of other attention functions; those that would change the result are refused.

    Returns:
        ``(1, T, heads, d_v)`` and None (no attention weights).

    Raises:
        BaseModelError: the layer asks for something this function does not do.
    """
    if isinstance(attention_mask, Segments):
        segments, attention_mask = attention_mask, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    problems = [f"'{name}'" for name in _UNSUPPORTED if others.get(name) is not None]
    problems += ["an attention mask"] if attention_mask is not None else []
    if segments is None or problems:
        problems += ["no sample boundaries"] if segments is None else []
        raise BaseModelError(
            f"packed attention cannot do what {type(module).__name__} asks for",
            where={"asked for": ", ".join(problems)},
            hint="the model is run one sample at a time instead, without this function",
        )
    segments.windows.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, softcap, causal=bool(causal))
    function = attend if key.shape[2] == query.shape[2] else _attend_with_prefix
    out = function(query[0], key[0], value[0], segments, rule, dropout=dropout)
    return out.transpose(0, 1).unsqueeze(0), None


def _attend_with_prefix(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule, *, dropout: float
) -> Tensor:
    """Attention within segments that all find the keys standing before those of the row, as of tokens of their own."""
    added = key.shape[1] - query.shape[1]
    order, places = interleaved(segments.lengths, query.shape[1], added, device=query.device)
    longer = dataclasses.replace(segments, lengths=tuple(n + added for n in segments.lengths))
    query = functional.pad(query, (0, 0, added, 0))
    return attend(query[:, order], key[:, order], value[:, order], longer, rule, dropout=dropout)[:, places]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    rule: Rule,
    *,
    rotary: Rotary | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within each segment.

    Args:
        query: ``(heads, T, d)``.
        key: ``(key_value_heads, T, d)``; ``heads`` is a multiple of ``key_value_heads``.
        value: ``(key_value_heads, T, d_v)``.
        segments: samples whose lengths add up to T or less; tokens behind them get zeros.
        rule: scaling, window, softcap and direction.
        rotary: positions by which queries and keys are still to be turned.
        dropout: probability of dropping a weight; above 0 PyTorch's autograd does the backward.

    Returns:
        ``(heads, T, d_v)``.
    """
    if dropout or query.device.type != "cpu":
        if rotary:
            query, key = turned(query, rotary), turned(key, rotary)
        return _by_pytorch(query, key, value, segments, rule, dropout=dropout)
    out: Tensor = _SegmentAttention.apply(
        query, key, value, *(rotary or (None, None)), (segments.bounds, rule)
    )
    return out


def _by_pytorch(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule, *, dropout: float
) -> Tensor:
    if not dropout and flex_takes(query, value):
        return flex_attend(query, key, value, segments, rule)
    parts = [
        _library_attention(query[:, a:b], key[:, a:b], value[:, a:b], rule, dropout)
        for a, b in segments.bounds
    ]
    return functional.pad(torch.cat(parts, dim=1), (0, 0, 0, query.shape[1] - sum(segments.lengths)))


def _library_attention(query: Tensor, key: Tensor, value: Tensor, rule: Rule, dropout: float) -> Tensor:
    """One segment by PyTorch alone, through its autograd."""
    hidden = hidden_keys(query.shape[1], 0, 0, rule, query.device)
    if rule.softcap is None and rule.window is None:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=rule.causal, dropout_p=dropout, scale=rule.scaling,
            enable_gqa=True,
        )[0]  # fmt: skip
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


class _SegmentAttention(torch.autograd.Function):
    """Attention on the CPU; saves query, key, value, output and one number per query and head."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position only)
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Any, sin: Any, plan: Plan
    ) -> Tensor:
        rotary = None if cos is None else (cos, sin)
        call = _kernel_call(query, key, value, rotary, plan)
        if call is not None:
            out, log_sums = calls.attention_forward(call)
            out = out.transpose(0, 1)
        else:
            if rotary:
                query, key = turned(query, rotary), turned(key, rotary)
            out, log_sums = plain_forward(query, key, value, plan)
        # Turned queries and keys of the twin are kept as they are: of the same size as the others.
        ctx.save_for_backward(query, key, value, cos, sin, out, log_sums)
        ctx.plan, ctx.compiled = plan, call is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cos, sin, out, log_sums = ctx.saved_tensors
        rotary = None if cos is None else (cos, sin)
        if ctx.compiled:
            call = _called(query, key, value, rotary, ctx.plan)
            grad = grads[0].transpose(0, 1).contiguous()
            made = calls.attention_backward(call, out.transpose(0, 1), log_sums, grad)
            return *(x.transpose(0, 1) for x in made), None, None, None
        grad_query, grad_key, grad_value = plain_backward(
            query, key, value, out, log_sums, grads[0], ctx.plan
        )
        if rotary:
            grad_query, grad_key = turned(grad_query, rotary, back=True), turned(grad_key, rotary, back=True)
        return grad_query, grad_key, grad_value, None, None, None


def _kernel_call(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None, plan: Plan
) -> calls.AttentionCall | None:
    takes = calls.AttentionCall.takes(query, key, value, rotary)
    return _called(query, key, value, rotary, plan) if takes else None


def _called(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None, plan: Plan
) -> calls.AttentionCall:
    bounds, rule = plan
    return calls.AttentionCall(
        query,
        key,
        value,
        rotary,
        bounds,
        scaling=rule.scaling,
        window=rule.window or 0,
        softcap=rule.softcap or 0.0,
        causal=rule.causal,
    )


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
