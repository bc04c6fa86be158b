"""VeRA: one frozen pair for layers of several sizes, saved or drawn anew."""

from __future__ import annotations

import peft

from addenda.methods.vera import VeRA

OURS = {"vera": lambda _: VeRA(rank=5, d_initial=0.7)}
THEIRS = {
    "vera": lambda _, **targets: peft.VeraConfig(r=6, d_initial=0.3, **targets),
    "drawn": lambda _, **targets: peft.VeraConfig(
        r=6, d_initial=0.3, save_projection=False, projection_prng_key=3, **targets
    ),
}
