"""LoRA-FA: PEFT has no name for it, and reads it as the LoRA it is."""

from __future__ import annotations

from addenda.methods.lora_fa import LoRAFA

OURS = {"plain": lambda _: LoRAFA(rank=4, alpha=6.0)}
THEIRS = {}
