"""VB-LoRA: all logits saved, or the chosen vectors alone."""

from __future__ import annotations

import peft

from addenda.methods.vblora import VBLoRA

OURS = {
    "vblora": lambda _: VBLoRA(rank=3, vectors=9),
    "three": lambda _: VBLoRA(rank=2, vectors=7, length=8, top=3),
}


def theirs(**settings: object) -> object:
    return lambda _, **targets: peft.VBLoRAConfig(
        r=3, num_vectors=11, vector_length=16, init_vector_bank_bound=0.5, **settings, **targets
    )


THEIRS = {
    "vblora": theirs(),
    "chosen": theirs(save_only_topk_weights=True),
    "chosen-of-three": theirs(save_only_topk_weights=True, topk=3),
    "one": theirs(topk=1),
}
