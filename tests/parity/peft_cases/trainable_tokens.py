"""Trainable tokens: of an embedding, of an untied pair, and of a tied pair, whose head PEFT takes along."""

from __future__ import annotations

import peft

from addenda.methods.trainable_tokens import TrainableTokens

TARGETS = {"llama": ("embed_tokens", "lm_head"), "gpt2": ("wte", "lm_head")}
SLACK = 1e-6  # the rows come back as their difference from the base's
OURS = {"rows": lambda _: TrainableTokens(tokens=(9, 3, 24))}
THEIRS = {
    "rows": lambda _, target_modules, **__: peft.TrainableTokensConfig(
        token_indices=[9, 3, 24], target_modules=target_modules[:1]
    ),
    # PEFT 0.21.2 fails where both of a tied pair are named.
    "both": lambda kind, target_modules, **__: peft.TrainableTokensConfig(
        token_indices=[5, 4, 22, 1], target_modules=target_modules[: 1 if kind == "gpt2" else 2]
    ),
}
