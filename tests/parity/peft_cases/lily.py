"""Lily: A for one layer or for two, two or three B; PEFT has it for linear layers alone."""

from __future__ import annotations

import peft

from addenda.methods.lily import Lily

KINDS = ("llama",)
OURS = {
    "lily": lambda _: Lily(rank=5),
    "alone": lambda _: Lily(rank=4, stride=1, experts=3, scaling=0.5),
}


def theirs(**settings: object) -> object:
    def make(_: str, *, fan_in_fan_out: bool, **targets: object) -> object:
        return peft.LilyConfig(r=6, **settings, **targets)

    return make


THEIRS = {"alone": theirs(), "pairs": theirs(stride_A=2, num_B=3, scaling=2.0)}
