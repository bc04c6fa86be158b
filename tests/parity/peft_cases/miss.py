"""MiSS: its three modes, and shards that do not divide the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.miss import MiSS

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it
OURS = {
    "balance": lambda _: MiSS(rank=5),
    "mini": lambda _: MiSS(rank=4, mode="mini", mini_rank=8),
    "bat": lambda _: MiSS(rank=8, mode="bat"),
}


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.MissConfig(target_modules=target_modules, **settings)


THEIRS = {
    "balance": theirs(r=6, miss_dropout=0.1),
    "mini": theirs(r=7, mini_r=4, init_weights="mini"),
    "bat": theirs(r=4, init_weights="bat"),
}
