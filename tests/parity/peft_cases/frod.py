"""FRoD: basis and places saved or made anew, with few, many and no mixed directions."""

from __future__ import annotations

import peft

from addenda.methods.frod import FRoD

OURS = {
    "frod": lambda _: FRoD(share=0.05),
    "diagonal": lambda _: FRoD(share=0.0),
}


def theirs(**settings: object) -> object:
    return lambda _, **targets: peft.FrodConfig(progressbar=False, **settings, **targets)


THEIRS = {
    "frod": theirs(),
    "drawn": theirs(save_projection=False, projection_prng_key=5, sparse_rate=0.1),
    "ridge": theirs(regularization_alpha=0.1, sparse_rate=0.03),
}
