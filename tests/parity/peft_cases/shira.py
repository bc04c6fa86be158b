"""SHiRA: random places, and those of the largest numbers."""

from __future__ import annotations

import peft

from addenda.methods.shira import SHiRA

KINDS = ("llama",)
OURS = {
    "random": lambda _: SHiRA(rank=3),
    "magnitude": lambda _: SHiRA(rank=2, mask="magnitude"),
}
THEIRS = {"random": lambda _, **targets: peft.ShiraConfig(r=4, random_seed=7, **targets)}
