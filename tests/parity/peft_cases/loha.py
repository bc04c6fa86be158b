"""LoHa: as a product of low rank and as a dense one, with ranks and alphas of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.loha import LoHa

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it
OURS = {
    "low-rank": lambda _: LoHa(rank=3, alpha=5.0),
    "dense": lambda _: LoHa(rank=6),
    "per-layer": lambda _: LoHa(rank=4, ranks={"v_proj": 7}, alphas={"0.mlp.down_proj": 2.0}),
}


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.LoHaConfig(target_modules=target_modules, **settings)


THEIRS = {
    "low-rank": theirs(r=2, alpha=5, rank_dropout=0.1),
    "per-layer": theirs(r=6, rank_pattern={"down_proj": 2, "v_proj": 5}, alpha_pattern={"q_proj": 3}),
}
