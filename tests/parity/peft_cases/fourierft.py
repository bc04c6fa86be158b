"""FourierFT: places drawn from a seed, other numbers of coefficients in some layers."""

from __future__ import annotations

import peft

from addenda.methods.fourierft import FourierFT

INNER = {"llama": "down_proj", "gpt2": "c_fc"}
OURS = {
    "fourierft": lambda _: FourierFT(coefficients=60, scaling=20.0),
    "per-layer": lambda kind: FourierFT(coefficients=40, scaling=20.0, seed=5, counts={INNER[kind]: 90}),
}
THEIRS = {
    "fourierft": lambda _, **targets: peft.FourierFTConfig(n_frequency=50, scaling=10.0, **targets),
    "per-layer": lambda kind, **targets: peft.FourierFTConfig(
        n_frequency=50,
        n_frequency_pattern={INNER[kind]: 7},
        scaling=10.0,
        random_loc_seed=3,
        init_weights=True,
        **targets,
    ),
}
