"""A step as a GPU runs it, on the CPU: all its forms, traced and differentiated by PyTorch's compiler."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import flex_attention as library

import addenda
from addenda.bases.fast import attention, compiled, flex, padding, self_attention
from addenda.bases.fast import segments as segments_module
from addenda.bases.packed import PackedModel
from addenda.kernels.library import kernels_off
from addenda.train import offload
from addenda.train.loss import packed_loss

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=40, query_pre_attn_scalar=16),
}
LENGTHS = [100, 1, 180, 60]

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def attend_elsewhere(query, key, value, segments, rule, *, rotary=None, dropout=0.0):
    if rotary:
        query, key = segments_module.turned(query, rotary), segments_module.turned(key, rotary)
    return attention._by_pytorch(query, key, value, segments, rule, dropout=dropout)


def step(model, handle, *, recompute=0, hooks=None):
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    ids = torch.arange(sum(LENGTHS)) * 7 % 97
    offloading = offload.Offload(model, torch.device("cpu")) if hooks else None
    if offloading is None:
        hidden = packed.hidden(ids, LENGTHS, recompute=recompute)
    else:
        with offloading.on():
            hidden = packed.hidden(ids, LENGTHS, recompute=recompute)
        assert offloading.copied
    places = torch.arange(0, 300, 3)
    loss = packed_loss(packed, hidden, places, ids[places + 1], denominator=100)
    return [hidden.detach(), *torch.autograd.grad(loss, [p for p in handle.parameters() if p.requires_grad])]


@pytest.mark.parametrize(("recompute", "hooks"), [(0, False), (2, True)])
@pytest.mark.parametrize("family", ["llama", "gemma2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_states_and_gradients_are_those_of_the_cpus_own_forms(family, recompute, hooks, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    handle = addenda.attach(model, addenda.LoRA(rank=4), "all-linear")
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.05)
    with kernels_off():
        theirs = step(model, handle)
        torch._dynamo.reset()
        compiled.compiled.cache_clear()
        used, compile_ = set(), torch.compile

        def traced(function, **options):
            used.add(function.__name__)
            return compile_(function, **options, backend="aot_eager")

        monkeypatch.setattr(torch, "compile", traced)
        monkeypatch.setattr(compiled, "runs_compiled", lambda _: True)
        monkeypatch.setattr(flex, "runs_compiled", lambda _: True)
        monkeypatch.setattr(flex, "_flex_on", lambda _: compiled.compiled(library.flex_attention))
        for module in (attention, self_attention):
            monkeypatch.setattr(module, "attend", attend_elsewhere)
        monkeypatch.setattr(library, "_validate_device", lambda *_: None)
        monkeypatch.setattr(padding, "TOKEN_MULTIPLE", flex.BLOCK)
        monkeypatch.setattr(offload, "LEAST_BYTES", 1)
        ours = step(model, handle, recompute=recompute, hooks=hooks)
    compiled.compiled.cache_clear()
    assert {"flex_attention", "turned", "_plain", "_plain_backward"} <= used
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
