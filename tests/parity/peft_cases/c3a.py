"""C3A: blocks of one size, and of several. PEFT does linear layers only."""

from __future__ import annotations

import peft

from addenda.methods.c3a import C3A

KINDS = ("llama",)
OURS = {
    "c3a": lambda _: C3A(block_size=8),
    "nearest": lambda _: C3A(block_size=1000),
    "odd": lambda _: C3A(block_size=1),
    "per-layer": lambda _: C3A(block_size=8, block_sizes={"0.mlp.down_proj": 4, "v_proj": 16}),
}


def theirs(**settings):
    return lambda _, target_modules, **__: peft.C3AConfig(target_modules=target_modules, **settings)


THEIRS = {
    "c3a": theirs(block_size=8),
    "zero": theirs(block_size=4, init_weights=True),
    "per-layer": theirs(block_size=16, block_size_pattern={"layers.1.mlp.down_proj": 2, "q_proj": 8}),
}
