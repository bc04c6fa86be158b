"""DoRA: plain, rank-stabilized, with ranks and alphas of single layers."""

from __future__ import annotations

import peft

from addenda.methods.dora import DoRA

LAST = {"llama": "down_proj", "gpt2": "c_fc"}
OURS = {
    "plain": lambda _: DoRA(rank=4),
    "per-layer": lambda kind: DoRA(
        rank=6, alpha=5.0, rank_stabilized=True, ranks={LAST[kind]: 3}, alphas={LAST[kind]: 7.0}
    ),
}
THEIRS = {
    "plain": lambda _, **targets: peft.LoraConfig(r=4, lora_alpha=9, use_dora=True, **targets),
    "per-layer": lambda kind, **targets: peft.LoraConfig(
        use_dora=True, use_rslora=True, rank_pattern={LAST[kind]: 3}, lora_dropout=0.1, **targets
    ),
}
