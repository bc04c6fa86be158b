"""WaveFT: every wavelet that is read, none, and numbers of coefficients that go with the layers' sizes."""

from __future__ import annotations

import peft

from addenda.methods.waveft import WaveFT

INNER = {"llama": "down_proj", "gpt2": "c_fc"}
OURS = {
    "haar": lambda _: WaveFT(coefficients=60, scaling=1.0),
    "none": lambda _: WaveFT(coefficients=60, scaling=1.0, wavelet="none"),
    "per-layer": lambda kind: WaveFT(
        coefficients=40, scaling=1.0, seed=5, wavelet="db4", counts={INNER[kind]: 90}
    ),
}


def theirs(**settings):
    return lambda _, **targets: peft.WaveFTConfig(n_frequency=80, scaling=1.0, **settings, **targets)


THEIRS = {
    **{f"db{order}": theirs(wavelet_family=f"db{order}") for order in range(1, 11)},
    "none": theirs(use_idwt=False, random_loc_seed=3),
    "proportional": theirs(proportional_parameters=True, init_weights=False),
    "per-layer": lambda kind, **targets: peft.WaveFTConfig(
        n_frequency=50, n_frequency_pattern={INNER[kind]: 7}, scaling=1.0, **targets
    ),
}
