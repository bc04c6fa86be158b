"""DeLoRA: one rank and strength, and those of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.delora import DeLoRA

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it
OURS = {
    "plain": lambda _: DeLoRA(rank=3, strength=2.0),
    "per-layer": lambda _: DeLoRA(rank=4, ranks={"v_proj": 7}, strengths={"0.mlp.down_proj": 3.0}),
}


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.DeloraConfig(target_modules=target_modules, **settings)


THEIRS = {
    "plain": theirs(r=3, delora_lambda=2, module_dropout=0.1),
    "per-layer": theirs(r=5, rank_pattern={"down_proj": 2, "v_proj": 4}, lambda_pattern={"q_proj": 3}),
}
