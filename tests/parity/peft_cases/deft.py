"""DEFT and PaRa, with both projections."""

from __future__ import annotations

import peft

from addenda.methods.deft import DEFT
from addenda.methods.para import PaRa

OURS = {
    "relu": lambda _: DEFT(rank=3, alpha=5.0),
    "orthogonal": lambda _: DEFT(rank=4, projection="orthogonal"),
    "para": lambda _: PaRa(rank=4),
    "para-relu": lambda _: PaRa(rank=4, projection="relu"),
}
THEIRS = {
    "relu": lambda _, **targets: peft.DeftConfig(r=4, init_weights=False, deft_dropout=0.1, **targets),
    "orthogonal": lambda _, **targets: peft.DeftConfig(r=3, decomposition_method="qr", alpha=7, **targets),
    "para": lambda _, **targets: peft.DeftConfig(r=3, decomposition_method="qr", para=True, **targets),
}
