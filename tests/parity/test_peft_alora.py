"""An invoked adapter writes under PEFT what it writes here, over a cache, with and without an invocation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.export.peft import write_peft
from addenda.methods.alora import ALoRA

peft = pytest.importorskip("peft")


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_generation_is_pefts(tmp_path: Path) -> None:
    ours = make()
    handle = addenda.attach(ours, ALoRA(invocation=(7, 3), rank=4, alpha=16.0))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0.0, 0.3)
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    ids = torch.tensor([[5, 7, 3, 9, 7, 3, 4], [5, 3, 7, 9, 7, 2, 4]])
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    wanted = theirs.generate(input_ids=ids, **settings)
    assert torch.equal(ours.generate(ids, **settings), wanted)
    plain = make().generate(ids, **settings)
    assert torch.equal(wanted[1], plain[1])
    assert not torch.equal(wanted[0], plain[0])
