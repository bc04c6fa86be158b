"""HRA: free reflections and orthonormal ones. PEFT does linear layers and convolutions."""

from __future__ import annotations

import peft

from addenda.methods.hra import HRA

KINDS = ("llama",)
OURS = {
    "hra": lambda _: HRA(rank=6),
    "odd": lambda _: HRA(rank=5, regularization=1e-3),
    "orthonormal": lambda _: HRA(rank=4, orthonormal=True),
}


def theirs(**settings):
    return lambda _, target_modules, **__: peft.HRAConfig(target_modules=target_modules, **settings)


THEIRS = {
    "hra": theirs(r=8),
    "random": theirs(r=3, init_weights=False),
    "orthonormal": theirs(r=4, apply_GS=True, init_weights=False),
}
