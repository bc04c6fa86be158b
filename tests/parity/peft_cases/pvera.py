"""PVeRA: the frozen pair saved or drawn anew; outside training both answer with the mean."""

from __future__ import annotations

import peft

from addenda.methods.pvera import PVeRA

OURS = {"pvera": lambda _: PVeRA(rank=5, d_initial=0.7)}
THEIRS = {
    "pvera": lambda _, **targets: peft.PveraConfig(r=6, d_initial=0.3, **targets),
    "drawn": lambda _, **targets: peft.PveraConfig(
        r=6, d_initial=0.3, save_projection=False, projection_prng_key=5, **targets
    ),
}
