"""PSOFT: rotations in every form, both cuts of the weight, both decompositions. PEFT does linear layers only."""

from __future__ import annotations

import peft

from addenda.methods.psoft import PSOFT

KINDS = ("llama",)
OURS = {
    "psoft": lambda _: PSOFT(rank=6),
    "free": lambda _: PSOFT(rank=5, orthogonal=False, scale_input=False, symmetric=True),
    "series": lambda _: PSOFT(rank=7, exact=False, terms=6, bound=0.7, scale_output=False),
    "randomized": lambda _: PSOFT(rank=6, iterations=3, seed=9),
}


def theirs(**settings):
    return lambda _, **targets: peft.PsoftConfig(**settings, **targets)


THEIRS = {
    "psoft": theirs(r=6, psoft_alpha=20),
    "plain": theirs(r=8, psoft_mag_a=False, psoft_mag_b=False, psoft_dropout=0.1),
    "free": theirs(r=8, psoft_orth=False, ab_svd_init="pissa_init"),
    "series": theirs(r=6, use_cayley_neumann=True, num_cayley_neumann_terms=3),
    "bounded": theirs(r=6, use_cayley_neumann=True, cayley_neumann_eps=0.5, init_weights=False),
    "randomized": theirs(r=6, psoft_svd="lowrank", psoft_svd_lowrank_niter=4, random_seed=5),
}
