"""AdaMSS: PEFT asks for scikit-learn, without which there is nothing to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import peft

from addenda.methods.adamss import AdaMSS

KINDS = ("llama",)  # PEFT does not adapt transformers' Conv1D with it


def theirs(**settings: Any) -> Callable[..., Any]:
    return lambda _, target_modules, **__: peft.AdamssConfig(target_modules=target_modules, **settings)


HAVE = importlib.util.find_spec("sklearn") is not None
OURS = (
    {
        "few": lambda _: AdaMSS(basis_rank=12, subspaces=2),
        "three": lambda _: AdaMSS(basis_rank=14, subspaces=3, seed=3),
    }
    if HAVE
    else {}
)
THEIRS = (
    {
        "few": theirs(r=10, num_subspaces=4, subspace_rank=2),
        "three": theirs(r=14, num_subspaces=3, subspace_rank=3, random_seed=5, use_asa=True),
    }
    if HAVE
    else {}
)
