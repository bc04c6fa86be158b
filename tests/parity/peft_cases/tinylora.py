"""TinyLoRA: vectors of single layers, shared by some or by all; mixtures saved or drawn anew."""

from __future__ import annotations

import peft

from addenda.methods.tinylora import TinyLoRA

OURS = {
    "tinylora": lambda _: TinyLoRA(rank=3, size=9),
    "some-share": lambda _: TinyLoRA(size=6, tying=0.6),
    "all-share": lambda _: TinyLoRA(size=11, tying=1.0),
}


def theirs(**settings: object) -> object:
    return lambda _, **targets: peft.TinyLoraConfig(**{"r": 2, "u": 8, **settings}, **targets)


THEIRS = {
    "tinylora": theirs(),
    "some-share": theirs(weight_tying=0.4),
    "all-share-drawn": theirs(weight_tying=1.0, save_projection=False, projection_seed=3),
    "drawn": theirs(r=4, save_projection=False, init_weights="uniform"),
}
