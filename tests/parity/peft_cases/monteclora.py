"""MonteCLoRA: LoRA once it is trained, with a sampler beside it."""

from __future__ import annotations

import peft

from addenda.methods.monteclora import MonteCLoRA

NARROW = {"llama": "1.mlp.down_proj", "gpt2": "1.mlp.c_fc"}
OURS = {
    "plain": lambda _: MonteCLoRA(rank=4, alpha=6.0),
    "settings": lambda kind: MonteCLoRA(
        rank=3, samples=5, noise=0.1, prior=0.5, kl=0.0, ranks={NARROW[kind]: 2}
    ),
}
THEIRS = {
    "plain": lambda _, **targets: peft.LoraConfig(
        r=4, lora_alpha=9, monteclora_config=peft.MontecloraConfig(buffer_size=2), **targets
    ),
    "settings": lambda _, **targets: peft.LoraConfig(
        r=4,
        use_rslora=True,
        monteclora_config=peft.MontecloraConfig(num_samples=3, use_entropy=True, buffer_size=2),
        **targets,
    ),
}
