"""Self-attention of the usual build: queries, keys and values of one input share its products, and rotary positions are
applied while they are read.

How the module scales, caps and windows its scores is not read off its attributes but recorded while it runs: the
module hands it all to the attention function that transformers lets one choose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases.fast.attention import attend
from addenda.bases.fast.fusion import Fusion, Unproven, linear_layers, near, probe, quietly
from addenda.bases.fast.segments import Rotary, Rule, Segments
from addenda.core.sharing import shared_linear

__all__ = ["arguments_of", "own_attention", "self_attention"]

KIND = "self-attention"

ROLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
"""What the three projections are called."""

OUTPUTS = ("o_proj", "out_proj", "dense")
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
"""What the norms of queries and keys are called, where there are some."""

RECORDING = "addenda_recording"
"""The name of the recording function in transformers' table of attention functions."""


@dataclass(frozen=True)
class _Parts:
    """The layers of one self-attention."""

    projections: tuple[nn.Module, nn.Module, nn.Module]
    norms: tuple[nn.Module, nn.Module] | None
    output: nn.Module | None
    head_width: int
    rule: Rule
    rotated: bool


def self_attention(module: nn.Module, like: Tensor) -> Fusion | Unproven | None:
    """Recognise ``output(attention(rotary(norm(q(x))), rotary(norm(k(x))), v(x)))``."""
    names = {name for name, _ in module.named_children()}
    roles = next((roles for roles in ROLES if set(roles) <= names), None)
    if roles is None or not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return None
    query: Any = module.get_submodule(roles[0])
    if not hasattr(query, "in_features"):
        return None
    x = probe(like, 1, 6, query.in_features)
    for width in _rotary_widths(module):
        seen = _record(module, x, _positions(like, 6, width))
        if isinstance(seen, str):
            return Unproven(KIND, module, seen)
        if seen is None:
            continue
        norms = next((pair for pair in NORMS if set(pair) <= names), None)
        for rotated in (True, False) if width else (False,):
            parts = _Parts(
                tuple(module.get_submodule(role) for role in roles),  # type: ignore[arg-type]
                None if norms is None else (module.get_submodule(norms[0]), module.get_submodule(norms[1])),
                next((module.get_submodule(name) for name in OUTPUTS if name in names), None),
                seen.head_width,
                seen.rule,
                rotated,
            )
            if _proven(parts, seen, x, width):
                return Fusion(KIND, module, type(module), _lean(module, parts))
    return Unproven(KIND, module, "it computes something other than attention of its three projections")


# ------------------------------------------------------------------------------------------------------ the lean form


def _lean(module: nn.Module, parts: _Parts) -> Callable[..., Any]:
    own, signature = type(module).forward, inspect.signature(type(module).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(module, *args, **kwargs).arguments
        named = {**given, **given.get("kwargs", {})}
        x, segments = named["hidden_states"], named.get("segments")
        refused = ("attention_mask", "past_key_values", "head_mask", "encoder_hidden_states")
        if segments is None or x.shape[0] != 1 or any(named.get(name) is not None for name in refused):
            return own(module, *args, **kwargs)
        segments.windows.add(parts.rule.window)
        rotary = _rotary(named.get("position_embeddings")) if parts.rotated else None
        return _attended(parts, x, segments, rotary), None

    return forward


def _attended(parts: _Parts, x: Tensor, segments: Segments, rotary: Rotary | None) -> Tensor:
    """x: (1, T, d_model) -> (1, T, d_out)."""
    query, key, value = (
        y.view(x.shape[1], -1, parts.head_width) for y in shared_linear(parts.projections, x)
    )
    if parts.norms:
        query, key = parts.norms[0](query), parts.norms[1](key)
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    out = attend(query, key, value, segments, parts.rule, rotary=rotary)
    flat = out.transpose(0, 1).reshape(1, x.shape[1], -1)
    return flat if parts.output is None else parts.output(flat)


def _rotary(embeddings: Any) -> Rotary:
    cos, sin = embeddings
    return cos[0].contiguous(), sin[0].contiguous()


# --------------------------------------------------------------------------------------------------------- the proof


@dataclass(frozen=True)
class _Seen:
    """What a module handed to its attention function."""

    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule
    head_width: int
    answer: Tensor | None = None
    """What the module makes of values in place of what its attention function would give, (1, T, d_out)."""


def _proven(parts: _Parts, seen: _Seen, x: Tensor, width: int) -> bool:
    """Whether the lean form gives what the module's own forward makes of the same attention function."""
    segments = Segments((x.shape[1],))
    rotary = _positions(x, x.shape[1], width)
    ours = quietly(_attended, parts, x, segments, rotary if parts.rotated else None)
    with torch.no_grad():
        out = attend(seen.query[0], seen.key[0], seen.value[0], segments, seen.rule)
    # Queries and keys that were rounded once more or less shift a score by as much.
    units = 16 if x.dtype in (torch.bfloat16, torch.float16) else 256
    finished = _finished(parts, _all_heads(seen.value[0], len(seen.query[0])))
    return near(ours, _finished(parts, out), units=units) and near(finished, seen.answer, units=units)


def _finished(parts: _Parts, out: Tensor) -> Tensor | None:
    """(heads, T, d) of an attention function -> what the module makes of it, (1, T, d_out)."""
    flat = out.transpose(0, 1).reshape(1, out.shape[1], -1)
    return flat if parts.output is None else quietly(parts.output, flat)


def _all_heads(value: Tensor, heads: int) -> Tensor:
    return value.repeat_interleave(heads // len(value), 0)


def _record(module: Any, x: Tensor, rotary: Rotary | None) -> _Seen | str | None:
    """Run the module's own forward; None where it does not run so, a reason where it asks for what we do not do."""
    seen: list[_Seen | str] = []

    def recording(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **asked: Any) -> Any:
        seen.append(_asked(layer, query, key, value, asked))
        return _all_heads(value[0], query.shape[1]).transpose(0, 1)[None], None

    arguments = _arguments(module, rotary)
    if arguments is None:
        return None
    with _attending_by(module, recording):
        answer = quietly(module, x, **arguments)
    if not seen:
        return None
    if not isinstance(answer, tuple) or len(answer) != 2 or answer[1] is not None:
        return "it returns something other than the output and its attention weights"
    last = seen[-1]
    return last if isinstance(last, str) else replace(last, answer=answer[0])


def own_attention(module: nn.Module, like: Tensor) -> Unproven | None:
    """Say by which function a module attends to a batch: its own, which is given its masks, dropout and weights.

    PyTorch's fused attention is as fast there as the kernel for packed rows; what matters is whether it is used.
    """
    config: Any = getattr(module, "config", None)
    layers = linear_layers(module)
    if not layers or not hasattr(config, "_attn_implementation"):
        return None
    x = probe(like, 1, 6, layers[0].in_features)
    for rotated in _rotary_widths(module):
        seen = _record(module, x, _positions(like, 6, rotated))
        if seen is not None:
            own = f"on whole batches it runs as the model's own, '{config._attn_implementation}'"
            return Unproven("attention", module, f"{own}; {seen}" if isinstance(seen, str) else own)
    return None


def _asked(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]) -> _Seen | str:
    if asked.get("dropout"):
        return "it drops attention weights while training"
    for name in ("s_aux", "position_bias", "cache"):
        if asked.get(name) is not None:
            return f"it asks its attention function for '{name}'"
    widths = {part.shape[-1] for part in (query, key, value)}
    if len(widths) > 1:
        return "its queries, keys and values differ in width"
    scaling = asked.get("scaling")
    causal = asked.get("is_causal")
    rule = Rule(
        widths.copy().pop() ** -0.5 if scaling is None else float(scaling),
        asked.get("sliding_window"),
        asked.get("softcap"),
        bool(getattr(layer, "is_causal", True) if causal is None else causal),
    )
    return _Seen(query, key, value, rule, widths.pop())


@contextmanager
def _attending_by(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let one module attend by `function`, as it would while training, within the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(RECORDING, function)
    former, mode = module.config._attn_implementation, module.training
    try:
        module.config._attn_implementation = RECORDING
        module.training = True  # this module alone, to see whether it drops weights then
        yield
    finally:
        module.config._attn_implementation, module.training = former, mode


def arguments_of(module: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Return what an attention layer may have to be called with beside its input ``x: (1, T, d)``, likeliest first."""
    rotaries = [_positions(x, x.shape[1], width) for width in _rotary_widths(module)]
    found = [_arguments(module, rotary) for rotary in rotaries]
    return [arguments for arguments in found if arguments is not None]


def _arguments(module: nn.Module, rotary: Rotary | None) -> dict[str, Any] | None:
    """No mask, and these positions; None where the module takes no positions."""
    named = inspect.signature(type(module).forward).parameters
    arguments: dict[str, Any] = {
        name: None for name in ("attention_mask", "position_embeddings") if name in named
    }
    if rotary is None:
        return arguments
    return (
        {**arguments, "position_embeddings": tuple(part[None] for part in rotary)}
        if "position_embeddings" in named
        else None
    )


def _positions(like: Tensor, tokens: int, width: int) -> Rotary | None:
    """Rotary positions of random angles; None for no width."""
    if not width:
        return None
    angles = probe(like, tokens, width // 2).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotary_widths(module: Any) -> list[int]:
    """How many numbers of a head may be turned: all of them, the share its configuration names, or none."""
    query: Any = next(module.children())
    config = getattr(module, "config", None)
    heads = getattr(config, "num_attention_heads", 1)
    whole = int(getattr(module, "head_dim", 0) or getattr(query, "out_features", heads) // heads)
    own = getattr(module, "rotary_ndims", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", 1.0) if isinstance(parameters, dict) else 1.0
    named = [own, int(whole * share) if isinstance(share, float) else None, whole, 0]
    return list(dict.fromkeys(width for width in named if isinstance(width, int) and width % 2 == 0))
