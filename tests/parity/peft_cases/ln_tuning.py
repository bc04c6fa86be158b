"""LN-tuning: RMS norms, which have no bias, and layer norms, which have one."""

from __future__ import annotations

import peft

from addenda.methods.ln_tuning import LNTuning

TARGETS = {"llama": ("input_layernorm", "model.norm"), "gpt2": ("ln_1", "ln_f")}
OURS = {"both": lambda _: LNTuning(), "gains": lambda _: LNTuning(biases=False)}
THEIRS = {"both": lambda _, target_modules, **__: peft.LNTuningConfig(target_modules=target_modules)}
