"""AdaLoRA: as it starts, and with other ranks on single layers."""

from __future__ import annotations

import peft

from addenda.methods.adalora import AdaLoRA

LAST = {"llama": "down_proj", "gpt2": "c_fc"}
FIRST = {"llama": "0.self_attn.q_proj", "gpt2": "0.attn.c_attn"}
OURS = {
    "plain": lambda _: AdaLoRA(rank=6, target_rank=3, alpha=11.0),
    "uneven": lambda kind: AdaLoRA(rank=6, target_rank=3, ranks={LAST[kind]: 2, FIRST[kind]: 1}),
}
THEIRS = {
    "plain": lambda _, **targets: peft.AdaLoraConfig(init_r=5, target_r=2, total_step=10, **targets),
    "no-alpha": lambda _, **targets: peft.AdaLoraConfig(
        init_r=5, lora_alpha=-1, total_step=10, tinit=2, tfinal=3, **targets
    ),
}
