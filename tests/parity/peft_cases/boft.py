"""BOFT: one and several butterfly factors. PEFT does linear layers only."""

from __future__ import annotations

import peft
import torch
from peft.tuners.boft import layer

from addenda.methods.boft import BOFT


class BlockDiagonal:
    """What PEFT's CUDA kernel does; without it PEFT makes one factor, whatever is asked."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


layer.get_fbd_cuda = lambda: True
layer.FastBlockDiag = BlockDiagonal

KINDS = ("llama",)
OURS = {
    "one-factor": lambda _: BOFT(block_size=8, factors=1),
    "two-factors": lambda _: BOFT(block_size=4, factors=2),
    "three-factors": lambda _: BOFT(block_size=4, factors=3),
    "blocks": lambda _: BOFT(blocks=8, factors=3),
}
THEIRS = {
    "default": lambda _, **targets: peft.BOFTConfig(**targets),
    "two-factors": lambda _, **targets: peft.BOFTConfig(
        boft_block_size=8, boft_n_butterfly_factor=2, boft_dropout=0.1, **targets
    ),
    "four-factors": lambda _, **targets: peft.BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=4, init_weights=False, **targets
    ),
    "blocks": lambda _, **targets: peft.BOFTConfig(
        boft_block_size=0, boft_block_num=8, boft_n_butterfly_factor=3, **targets
    ),
}
