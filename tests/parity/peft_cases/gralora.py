"""GraLoRA: two blocks and four, alone and with a plain LoRA beside it."""

from __future__ import annotations

import peft

from addenda.methods.gralora import GraLoRA

OURS = {
    "two": lambda _: GraLoRA(rank=6),
    "hybrid": lambda _: GraLoRA(rank=8, blocks=4, alpha=5.0, hybrid_rank=3),
    "one": lambda _: GraLoRA(rank=3, blocks=1),
}
THEIRS = {
    "two": lambda _, **targets: peft.GraloraConfig(r=4, alpha=3, **targets),
    "hybrid": lambda _, **targets: peft.GraloraConfig(
        r=8, gralora_k=4, hybrid_r=2, gralora_dropout=0.1, **targets
    ),
}
