"""PEANuT: without and with hidden layers, several activations; PEFT has it for linear layers alone."""

from __future__ import annotations

import peft

from addenda.methods.peanut import PEANuT

KINDS = ("llama",)
OURS = {
    "peanut": lambda _: PEANuT(rank=5),
    "deep": lambda _: PEANuT(rank=4, depth=2, activation="silu", scaling=0.5),
}


def theirs(**settings: object) -> object:
    def make(_: str, *, fan_in_fan_out: bool, **targets: object) -> object:
        return peft.PeanutConfig(r=6, **settings, **targets)

    return make


THEIRS = {
    "peanut": theirs(),
    "deep": theirs(depth=3, act_fn="gelu", scaling=2.0),
    "leaky": theirs(depth=1, act_fn="leaky_relu"),
}
