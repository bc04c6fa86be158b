"""RandLoRA: bases saved or drawn anew, dense or sparse."""

from __future__ import annotations

import peft

from addenda.methods.randlora import RandLoRA

OURS = {
    "randlora": lambda _: RandLoRA(rank=5, alpha=3.0),
    "sparse": lambda _: RandLoRA(rank=8, alpha=4.0, bases="sparse"),
    "very-sparse": lambda _: RandLoRA(rank=8, alpha=4.0, bases="very-sparse"),
}


def theirs(**settings: object) -> object:
    return lambda _, **targets: peft.RandLoraConfig(r=6, randlora_alpha=3, **settings, **targets)


THEIRS = {
    "randlora": theirs(),
    "drawn": theirs(save_projection=False, projection_prng_key=7),
    "sparse": theirs(sparse=True),
    "sparse-drawn": theirs(sparse=True, save_projection=False, projection_prng_key=3),
    "very-sparse-drawn": theirs(very_sparse=True, save_projection=False),
}
