"""How llama.cpp keeps each family of causal models that transformers runs: a record for each.

What a record says was held against llama.cpp itself: a random model of each family answers the same there.
Where llama.cpp takes a setting of the model for granted, the record says which value; a model with another is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCHITECTURES", "Architecture", "Value"]

Value = str | bool | int | float | list[str] | list[int] | list[float]
"""What a key of a GGUF file may hold. Integers are written as uint32, lists of them as int32, numbers as float32."""

Source = str | Callable[[Any], Any]
"""Where a value is read: an attribute of the model's config, or a function of the config."""


@dataclass(frozen=True)
class Architecture:
    """How one ``model_type`` of transformers is kept in a GGUF file."""

    name: str
    """Value of ``general.architecture``."""
    keys: Mapping[str, Source]
    """Hyperparameters by their key, without the architecture's name before it; left out where the value is None."""
    taken_for_granted: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the config that no key holds: the value that llama.cpp goes by, or a function of the config."""
    pairs_of_rows: bool = False
    """Whether rows of queries and keys lie in the pairs that the rotary embedding turns, not in halves of a head."""
    one_in_norms: bool = False
    """Whether a norm's weight w is kept as 1 + w."""
    transposed: tuple[str, ...] = ()
    """Names of the modules whose weight transformers keeps as (d_in, d_out)."""
    windows: bool = False
    """Whether sliding windows are kept; else texts must fit into one."""


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    return int(_head_width(config) * rope.get("partial_rotary_factor", 1.0))


def _every(step: int) -> Callable[[Any], list[str]]:
    """Layers of which each ``step``-th sees everything and those between a window."""

    def kinds(config: Any) -> list[str]:
        return [
            "sliding_attention" if (layer + 1) % step else "full_attention"
            for layer in range(config.num_hidden_layers)
        ]

    return kinds


def _query_scale(layers_of_the_largest: int) -> Callable[[Any], int]:
    """The largest Gemma of a generation, known by its layers, scales queries by another width than its heads'."""

    def scale(config: Any) -> int:
        if config.num_hidden_layers == layers_of_the_largest:
            return int(config.hidden_size // config.num_attention_heads)
        return _head_width(config)

    return scale


_SIZES: dict[str, Source] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": _head_width,
    "attention.value_length": _head_width,
    "rope.dimension_count": _rotated,
}
_SILU = {"hidden_act": "silu"}
_GEMMA_KEYS: dict[str, Source] = {
    **_SIZES,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_ALL_SPARSE = {**_SILU, "decoder_sparse_step": 1, "mlp_only_layers": []}

_LLAMA = Architecture("llama", _SIZES, _SILU, pairs_of_rows=True)

ARCHITECTURES: dict[str, Architecture] = {
    "gemma2": Architecture(
        "gemma2",
        _GEMMA_KEYS,
        {
            **_GELU,
            "layer_types": _every(2),
            "query_pre_attn_scalar": _query_scale(46),
            "tie_word_embeddings": True,
        },
        one_in_norms=True,
        windows=True,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        {**_GEMMA_KEYS, "attn_logit_softcapping": lambda config: None},
        {
            **_GELU,
            "layer_types": _every(6),
            "query_pre_attn_scalar": _query_scale(62),
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        one_in_norms=True,
        windows=True,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: config.n_inner or 4 * config.n_embd,
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
    "granite": Architecture(
        "granite",
        {
            **_SIZES,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        _SILU,
        pairs_of_rows=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Architecture(
        "llama",
        {**_SIZES, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        _SILU,
        pairs_of_rows=True,
    ),
    "olmo2": Architecture("olmo2", _SIZES, _SILU),
    "phi3": Architecture("phi3", _SIZES, _SILU),
    "qwen2": Architecture("qwen2", _SIZES, _SILU),
    "qwen2_moe": Architecture(
        "qwen2moe",
        {
            **_SIZES,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {**_ALL_SPARSE, "norm_topk_prob": False},
    ),
    "qwen3": Architecture("qwen3", _SIZES, _SILU),
    "qwen3_moe": Architecture(
        "qwen3moe",
        {
            **_SIZES,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {**_ALL_SPARSE, "norm_topk_prob": True},
    ),
}
"""The record of each ``model_type`` of a transformers config."""
