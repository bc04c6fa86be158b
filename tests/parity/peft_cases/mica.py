"""MiCA: PEFT's start with a frozen B, at one rank and at several."""

from __future__ import annotations

import peft

from addenda.methods.mica import MiCA

OURS = {
    "plain": lambda _: MiCA(rank=4, alpha=6.0),
    "per-layer": lambda kind: MiCA(
        rank=4, rank_stabilized=True, ranks={"down_proj": 3} if kind == "llama" else {"c_fc": 3}
    ),
}
THEIRS = {
    "plain": lambda _, **targets: peft.LoraConfig(r=4, lora_alpha=9, init_lora_weights="mica", **targets),
    "stabilized": lambda _, **targets: peft.LoraConfig(
        r=5, use_rslora=True, init_lora_weights="mica", **targets
    ),
}
