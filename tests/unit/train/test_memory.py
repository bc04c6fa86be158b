from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.bases.packed import PackedModel
from addenda.errors import OutOfMemory
from addenda.memory.arena import Arena
from addenda.train import memory
from addenda.train.memory import FRAGMENTED, measure_memory, out_of_memory_named, peak_memory_bytes

SETTINGS = {"train.tokens_per_micro_batch": (1024, 512), "method.rank": (16, 8)}


def test_the_peak_grows_by_what_was_held():
    code = """
from addenda.train import memory
from addenda.train.memory import peak_memory_bytes
before = peak_memory_bytes()["rss"]
block = bytearray(200_000_000)
block[::4096] = b"x" * len(block[::4096])
del block
print(peak_memory_bytes()["rss"] - before)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(answer.stdout) >= 150_000_000
    assert peak_memory_bytes()["rss"] > 10_000_000


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
            "4,096 bytes",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"),
            "1,610,612,736 bytes",
        ),
        (MemoryError(), "unknown"),
        (RuntimeError("std::bad_alloc"), "unknown"),
    ],
)
def test_a_failed_allocation_names_bytes_and_settings(error, asked):
    with pytest.raises(OutOfMemory) as caught, out_of_memory_named(SETTINGS):
        raise error
    assert caught.value.exit_code == 5
    assert asked in str(caught.value)
    assert "bytes" in caught.value.where["free"]
    assert "set train.tokens_per_micro_batch=512 (now 1024)" in caught.value.hint
    assert "set method.rank=8 (now 16)" in caught.value.hint


def test_an_allocation_that_cannot_be_is_named():
    with pytest.raises(OutOfMemory, match="400,000,000,000,000 bytes"), out_of_memory_named(SETTINGS):
        torch.zeros(10**14)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_named(SETTINGS):
        raise RuntimeError("shape mismatch")
    with pytest.raises(OutOfMemory, match="already named"), out_of_memory_named(SETTINGS):
        raise OutOfMemory("already named")


@pytest.fixture
def small():
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    handle = addenda.attach(model, addenda.LoRA(rank=4), "all-linear")
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model, handle, PackedModel(model)


def gradients(handle, packed, ids, lengths, recompute):
    hidden = packed.hidden(ids, lengths, recompute=recompute)
    parameters = [p for p in handle.parameters() if p.requires_grad]
    return hidden, torch.autograd.grad(hidden.square().mean(), parameters)


@pytest.mark.parametrize("recompute", [1, 3, 4])
def test_blocks_that_run_again_give_the_same_bits(small, recompute):
    _, handle, packed = small
    ids, lengths = torch.randint(0, 64, (40,)), [25, 15]
    plain, expected = gradients(handle, packed, ids, lengths, 0)
    again, ours = gradients(handle, packed, ids, lengths, recompute)
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def kept(packed, tokens, recompute):
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in packed.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = packed.hidden(torch.randint(0, 64, (tokens,)), [tokens], recompute=recompute)
    assert hidden.requires_grad
    note(hidden)  # whoever asked holds it
    return sum(size for place, size in sizes.items() if place not in weights)


@pytest.mark.parametrize("tokens", [256, 512])
def test_the_model_predicts_what_the_forward_keeps(small, tokens):
    _, handle, packed = small
    model = measure_memory(handle, packed)
    assert model.blocks == 4
    for recompute in (0, 1, 4):
        predicted = model.ledger(tokens, recompute).activations
        assert predicted == pytest.approx(kept(packed, tokens, recompute), rel=0.1)


def test_the_fewest_blocks_that_fit_are_run_again(small):
    _, handle, packed = small
    model = measure_memory(handle, packed)
    totals = [model.ledger(100_000, k).total for k in range(5)]
    assert totals[4] < totals[3] < totals[2] < totals[0]
    for k in (2, 3, 4):
        assert model.recompute_for(100_000, totals[k]) == k
        assert model.recompute_for(100_000, totals[k] - 1) != k
    assert model.recompute_for(100_000, totals[0]) == 0
    assert model.recompute_for(100_000, model.present) is None
    most = model.most_tokens(totals[4])
    assert most == pytest.approx(100_000, rel=1e-3)


def test_memory_is_linear_in_the_length(small):
    _, handle, packed = small
    model = measure_memory(handle, packed)
    fixed = model.ledger(0).total
    assert (model.ledger(32_000, 4).activations) == pytest.approx(
        2 * model.ledger(16_000, 4).activations, rel=1e-6
    )
    assert fixed >= model.present + model.trained


def test_a_heap_that_keeps_freed_blocks_costs_only_what_the_arena_does_not_hold(small):
    _, handle, packed = small
    model = measure_memory(handle, packed)
    assert 0 < model.loose_per_token < model.kept_per_token
    exact, kept_blocks = (model.ledger(50_000, keeps_memory=keeps) for keeps in (False, True))
    unused = kept_blocks.total - exact.total
    assert unused == pytest.approx(FRAGMENTED * 50_000 * model.loose_per_token, rel=1e-4)
    alone = replace(model, loose_per_token=model.kept_per_token)
    assert alone.ledger(50_000, keeps_memory=True).total > kept_blocks.total


def test_measuring_leaves_nothing_behind(monkeypatch):
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    made = []

    def arena(size):
        made.append(Arena(size))
        return made[-1]

    monkeypatch.setattr(memory, "Arena", arena)
    measure_memory(handle, PackedModel(model))
    gc.collect()
    assert [one.used for one in made] == [0]
