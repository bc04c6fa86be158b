"""LoKr: whole and factored matrices, with ranks and alphas of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.lokr import LoKr

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it
OURS = {
    "whole": lambda _: LoKr(rank=8, alpha=5.0),
    "factored": lambda _: LoKr(rank=2, factor=2),
    "both": lambda _: LoKr(rank=1, factor=5, decompose_both=True),
    "per-layer": lambda _: LoKr(rank=2, ranks={"v_proj": 1}, alphas={"0.mlp.down_proj": 7.0}),
}


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.LoKrConfig(target_modules=target_modules, **settings)


THEIRS = {
    "whole": theirs(r=8, alpha=5, rank_dropout=0.1),
    "factored": theirs(r=2, decompose_factor=4),
    "both": theirs(r=1, decompose_both=True, init_weights="lycoris"),
    "per-layer": theirs(r=2, rank_pattern={"down_proj": 1, "v_proj": 9}, alpha_pattern={"q_proj": 3}),
}
