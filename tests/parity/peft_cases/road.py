"""RoAd: its three variants. PEFT does linear layers only."""

from __future__ import annotations

import peft

from addenda.methods.road import RoAd

KINDS = ("llama",)
OURS = {f"variant-{variant}": lambda _, v=variant: RoAd(variant=v, group_size=8) for variant in (1, 2, 4)}


def theirs(**settings):
    return lambda _, target_modules, **__: peft.RoadConfig(target_modules=target_modules, **settings)


THEIRS = {
    f"variant-{variant}": theirs(variant=f"road_{variant}", group_size=4 * variant, init_weights=variant < 4)
    for variant in (1, 2, 4)
}
