"""aLoRA: an invocation that one of the two rows of the test holds, and one that both do."""

from __future__ import annotations

import peft

from addenda.methods.alora import ALoRA

OURS = {
    "one-row": lambda _: ALoRA(invocation=(5, 6, 7), rank=4),
    "everywhere": lambda _: ALoRA(rank=4),
}
THEIRS = {
    "one-row": lambda _, **targets: peft.LoraConfig(
        r=4, alora_invocation_tokens=[14, 15], task_type="CAUSAL_LM", **targets
    ),
}
