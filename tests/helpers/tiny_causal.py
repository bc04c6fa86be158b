"""Causal models of every family that a GGUF file is written for, small and random."""

from __future__ import annotations

from typing import Any

import torch
import transformers

MIXTURE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 3},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 7},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 1.7,
        "residual_multiplier": 0.8,
        "logits_scaling": 1.3,
    },
    "llama": {},
    "mistral": {"head_dim": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 48},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {**MIXTURE, "num_experts": 4, "norm_topk_prob": True},
}
"""What each family's config has beside what all share."""


def tiny_config(family: str, **settings: Any) -> Any:
    shared = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "vocab_size": 300,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        shared = {name: shared[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    return transformers.AutoConfig.for_model(family, **{**shared, **FAMILIES[family], **settings})


def tiny_model(family: str, **settings: Any) -> transformers.PreTrainedModel:
    """A model in evaluation mode, every value random, norms and biases too, so that each of them counts."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.3))
    return model.requires_grad_(False)
