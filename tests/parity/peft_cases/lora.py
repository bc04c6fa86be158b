"""LoRA: plain, rank-stabilized, with ranks and alphas of single layers, and starts whose product is taken off again."""

from __future__ import annotations

import peft

from addenda import LoRA

PER_LAYER = {
    "llama": {"ranks": {"0.mlp.down_proj": 2, "v_proj": 7}, "alphas": {"q_proj": 3.5}},
    "gpt2": {"ranks": {"c_fc": 3}, "alphas": {"c_attn": 11.0}},
}
PATTERNS = {
    "llama": {"rank_pattern": {"down_proj": 2, "v_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "gpt2": {"rank_pattern": {"c_fc": 7}, "alpha_pattern": {"c_attn": 2}},
}
OURS = {
    "plain": lambda _: LoRA(rank=4),
    "rank-stabilized": lambda _: LoRA(rank=6, alpha=5.0, rank_stabilized=True),
    "per-layer": lambda kind: LoRA(rank=4, **PER_LAYER[kind]),
    "per-layer-stabilized": lambda kind: LoRA(rank=4, **PER_LAYER[kind], rank_stabilized=True, dropout=0.1),
    "pissa": lambda _: LoRA(rank=4, start="pissa"),
    "olora-stabilized": lambda kind: LoRA(rank=5, start="olora", **PER_LAYER[kind], rank_stabilized=True),
    "bias": lambda _: LoRA(rank=4, bias=True, b_rate=16.0),
}
THEIRS = {
    "plain": lambda _, **targets: peft.LoraConfig(r=4, lora_alpha=9, **targets),
    "rank-stabilized": lambda _, **targets: peft.LoraConfig(
        r=4, lora_alpha=9, use_rslora=True, init_lora_weights="gaussian", **targets
    ),
    "per-layer": lambda kind, **targets: peft.LoraConfig(r=4, **PATTERNS[kind], **targets),
    "bias": lambda _, **targets: peft.LoraConfig(r=4, lora_bias=True, **targets),
}
