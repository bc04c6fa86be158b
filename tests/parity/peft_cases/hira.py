"""HiRA: plain, and with a dropout that an answer does not show. PEFT builds no layer with a rank of its own."""

from __future__ import annotations

import peft

from addenda.methods.hira import HiRA

LAST = {"llama": "down_proj", "gpt2": "c_fc"}
OURS = {"plain": lambda _: HiRA(rank=4, dropout=0.2)}
THEIRS = {
    "plain": lambda _, **targets: peft.HiraConfig(r=4, **targets),
    "gaussian": lambda kind, **targets: peft.HiraConfig(
        r=6, rank_pattern={LAST[kind]: 3}, hira_dropout=0.1, init_weights="gaussian", **targets
    ),
}
