"""KaSA: PEFT cuts the base's weight, ours takes the same off; PEFT has it for linear layers alone."""

from __future__ import annotations

import peft

from addenda.methods.kasa import KaSA

KINDS = ("llama",)
OURS = {
    "plain": lambda _: KaSA(rank=4, alpha=6.0, beta=0.1, gamma=0.0),
    "per-layer": lambda _: KaSA(rank=4, rank_stabilized=True, ranks={"down_proj": 3}, alphas={"q_proj": 5.0}),
}
THEIRS = {
    "plain": lambda _, **targets: peft.LoraConfig(
        r=4, lora_alpha=9, kasa_config=peft.KasaConfig(beta=0.5, gamma=0.25), **targets
    ),
    "stabilized": lambda _, **targets: peft.LoraConfig(
        r=5, use_rslora=True, kasa_config=peft.KasaConfig(), rank_pattern={"down_proj": 2}, **targets
    ),
}
