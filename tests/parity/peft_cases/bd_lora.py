"""BD-LoRA: A in blocks, B in blocks, neither; PEFT has it for linear layers alone."""

from __future__ import annotations

import peft

from addenda.methods.bd_lora import BDLoRA

KINDS = ("llama",)


def blocks(count: int, a: list[str], b: list[str]) -> peft.BdLoraConfig:
    return peft.BdLoraConfig(target_modules_bd_a=a, target_modules_bd_b=b, nblocks=count, match_strict=False)


OURS = {
    "plain": lambda _: BDLoRA(rank=4, alpha=6.0),
    "some-whole": lambda _: BDLoRA(
        rank=8, blocks=4, rank_stabilized=True, undivided=("v_proj",), ranks={"1.mlp.down_proj": 4}
    ),
}
THEIRS = {
    "plain": lambda _, **targets: peft.LoraConfig(
        r=4, lora_alpha=9, use_bdlora=blocks(2, ["down"], ["q_proj", "v_"]), **targets
    ),
    "some-whole": lambda _, **targets: peft.LoraConfig(
        r=8, use_rslora=True, use_bdlora=blocks(4, ["0.mlp.down_proj"], ["q_proj"]), **targets
    ),
}
