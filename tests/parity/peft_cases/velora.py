"""VeLoRA: what it computes is LoRA, beside a direction that only training reads."""

from __future__ import annotations

import peft

from addenda.methods.velora import VeLoRA

NARROW = {"llama": "1.mlp.down_proj", "gpt2": "1.mlp.c_fc"}
OURS = {
    "random": lambda _: VeLoRA(rank=4, alpha=6.0, groups=8, direction="random"),
    "not-yet": lambda kind: VeLoRA(rank=3, groups=5, scale=0.5, ranks={NARROW[kind]: 2}),
}
THEIRS = {
    "random": lambda _, **targets: peft.LoraConfig(
        r=4, lora_alpha=9, velora_config=peft.VeloraConfig(num_groups=8, init_type="random"), **targets
    ),
    "not-yet": lambda _, **targets: peft.LoraConfig(
        r=4, velora_config=peft.VeloraConfig(num_groups=7, scale=2.0), **targets
    ),
}
