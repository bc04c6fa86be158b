"""GLoRA on layers without a bias, as in Llama; with one, test_peft_products.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.glora import GLoRA

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it
OURS = {
    "low-rank": lambda _: GLoRA(rank=3),
    "vector": lambda _: GLoRA(weight="vector", prompt="vector", bias="vector"),
    "constant": lambda _: GLoRA(weight="constant", prompt="none", bias="none"),
}


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.GloraConfig(target_modules=target_modules, **settings)


THEIRS = {
    "low-rank": theirs(r=4),
    "vector": theirs(config_A_B="vector", config_C="vector", config_D_E="vector"),
    "constant": theirs(config_A_B="constant", config_C="none", config_D_E="none"),
}
