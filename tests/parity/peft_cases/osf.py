"""OSF: a share kept, a number, and those of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.osf import OSF

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it
OURS = {
    "half": lambda _: OSF(),
    "per-layer": lambda _: OSF(kept=9, kept_in={"v_proj": 0.25, "0.mlp.down_proj": 20}),
}


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.OSFConfig(target_modules=target_modules, **settings)


THEIRS = {
    "half": theirs(),
    "per-layer": theirs(effective_rank=30, rank_pattern={"layers.1.mlp.down_proj": 12, "v_proj": 0.7}),
}
