"""Uni-LoRA: indices saved or drawn anew, and a vector longer than the factors."""

from __future__ import annotations

import peft

from addenda.methods.unilora import UniLoRA

OURS = {
    "unilora": lambda _: UniLoRA(rank=3, size=50),
    "long": lambda _: UniLoRA(rank=1, size=5000),
}


def theirs(**settings: object) -> object:
    return lambda _, **targets: peft.UniLoraConfig(**{"r": 3, "theta_d_length": 61, **settings}, **targets)


THEIRS = {
    "saved": theirs(save_indices=True),
    "drawn": theirs(proj_seed=5),
    "long-drawn": theirs(r=1, theta_d_length=5000),
}
