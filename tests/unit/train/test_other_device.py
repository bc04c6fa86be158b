"""A step of training away from the CPU, on machines without a GPU: nothing may be made on another device.

Tensors of the meta device have shapes and no numbers, and autograd runs on them, so that every number asked back from
the device is an error too.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import addenda
from addenda.bases import formats
from addenda.bases.packed import PackedModel
from addenda.bases.packed_layers import PackedLinear, pack_linears
from addenda.bases.place import move
from addenda.bases.scores import evaluate_positions
from addenda.train.loss import packed_loss

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=6, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=6),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
LENGTHS = [9, 1, 14, 5]
CROSSINGS = ("aten::copy_", "aten::_to_copy")
"""What brings numbers from one device to another on purpose."""


class OneDevice(TorchDispatchMode):
    """Refuse every operation whose tensors lie on more than one device, numbers alone excepted."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        devices = {x.device for x in given}
        if len(devices) > 1 and func._schema.name not in CROSSINGS:
            raise AssertionError(f"{func} is given tensors on {devices}")
        return func(*args, **(kwargs or {}))


def adapted(family, weights=None):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    if weights:
        pack_linears(model, formats.get(weights), keep=model.get_output_embeddings())
    handle = addenda.attach(model, addenda.LoRA(rank=4), "all-linear")
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    return model, handle, packed


def row(device):
    ids = torch.zeros(sum(LENGTHS), dtype=torch.long, device=device)
    return ids, torch.arange(0, 20, device=device), ids[:20]


def test_the_guard_sees_a_mixed_product():
    with OneDevice(), pytest.raises(AssertionError, match=r"aten.mm"):
        torch.zeros(2, 2, device="meta") @ torch.zeros(2, 2)


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize(
    ("family", "weights"), [*((f, None) for f in FAMILIES), ("llama", "NF4"), ("llama", "INT8")]
)
def test_a_step_stays_on_the_device_of_the_model(family, weights, recompute):
    model, handle, packed = adapted(family, weights)
    move(model, "meta")
    parameters = [p for p in handle.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    with OneDevice():
        ids, places, targets = row("meta")
        hidden = packed.hidden(ids, LENGTHS, recompute=recompute)
        packed_loss(packed, hidden, places, targets, denominator=20).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        evaluate_positions(packed, hidden, places, targets)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in parameters)


def test_bytes_that_two_layers_share_are_moved_once():
    model, _, _ = adapted("llama", "NF4")
    shared = next(m for m in model.modules() if isinstance(m, PackedLinear))
    twin = PackedLinear(shared.raw, shared.weight_format, shared.width)
    both = nn.ModuleList([shared, twin])
    move(both, "meta")
    assert both[0].raw is both[1].raw
    assert {both[0].raw.device.type, both[0]._like.device.type} == {"meta"}
