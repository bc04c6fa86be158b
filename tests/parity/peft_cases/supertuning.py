"""Super-tuning: the largest numbers, the smallest, with a low-rank part, and without places in the file."""

from __future__ import annotations

import peft

from addenda.methods.supertuning import SuperTuning


def _theirs(**settings):
    return lambda _, target_modules, **__: peft.SupertuningConfig(target_modules=target_modules, **settings)


KINDS = ("llama",)
OURS = {
    "super": lambda _: SuperTuning(sparsity=0.9),
    "bottom": lambda _: SuperTuning(sparsity=0.7, smallest=True),
    "supra": lambda _: SuperTuning(sparsity=0.95, rank=3, alpha=5.0),
}
THEIRS = {
    "super": _theirs(sparsity=0.9),
    "bottom": _theirs(sparsity=0.8, select_top=False),
    "supra": _theirs(sparsity=0.95, r=3, lora_alpha=7.0),
}
