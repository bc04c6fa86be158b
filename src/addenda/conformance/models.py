"""Every kind of transformer on which a method that changes the sequence may stand, small enough to try."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

__all__ = ["MODELS", "VOCABULARY", "model_of"]

VOCABULARY = 67
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def _qwen() -> nn.Module:
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        **SIZES,
    )
    return transformers.Qwen3ForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SIZES,
    )
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    return transformers.BertForMaskedLM(config)


def _windowed() -> nn.Module:
    config = transformers.Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        **SIZES,
    )
    return transformers.Gemma2ForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen3": _qwen,
    "gpt2": _gpt2,
    "gemma2": _windowed,
    "bert": _bert,
}
"""Every model on which such methods are tried."""


def model_of(kind: str) -> nn.Module:
    """Return the model of this name, the same each time, ready to answer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = MODELS[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
