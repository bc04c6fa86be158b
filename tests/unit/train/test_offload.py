"""Offloading, with tensors of the CPU standing for a GPU's: the same bits come back, and nothing stays behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.bases.packed import PackedModel
from addenda.errors import ConfigError
from addenda.train import offload as room
from addenda.train.config import TrainConfig
from addenda.train.memory import MemoryModel
from addenda.train.offload import Offload, require_offloadable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(room, "LEAST_BYTES", 1)


@pytest.fixture
def packed():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    handle = addenda.attach(model, addenda.LoRA(rank=4), "all-linear")
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.05)
    return PackedModel(model), [p for p in handle.parameters() if p.requires_grad]


@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_gradients_have_the_same_bits(packed, recompute):
    runner, parameters = packed
    ids, lengths = torch.randint(0, 64, (40,)), [25, 15]
    offload = Offload(runner.model, CPU)

    def gradients():
        hidden = runner.hidden(ids, lengths, recompute=recompute)
        return hidden, hidden.square().sum()

    _, loss = gradients()
    plain = torch.autograd.grad(loss, parameters)
    with offload.on():
        _, loss = gradients()
    assert offload.copied > 0
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, parameters), plain, strict=True))


def test_weights_are_never_copied_and_a_tensor_that_two_need_is_copied_once():
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    x = torch.randn(5, 8, requires_grad=True)
    offload = Offload(layers, CPU)
    with offload.on():
        total = torch.stack([layer(x) for layer in layers]).sum()
    assert offload.copied == x.nbytes
    total.backward()
    assert all(layer.weight.grad is not None for layer in layers)


def test_a_new_tensor_in_the_place_of_one_that_is_gone_is_not_taken_for_it():
    offload, rows = Offload(nn.Identity(), CPU), [torch.randn(1000) for _ in range(20)]
    factor = torch.ones(1000, requires_grad=True)
    with offload.on():
        total = sum(
            (factor * (row * 1.0)).sum() for row in rows
        )  # each product is freed before the next is made
    total.backward()
    torch.testing.assert_close(factor.grad, torch.stack(rows).sum(0))


def test_what_was_written_to_after_it_was_saved_comes_back_as_it_was():
    offload, x = Offload(nn.Identity(), CPU), torch.randn(9, requires_grad=True)
    y = torch.randn(9)
    before = y.clone()
    with offload.on():
        first = (x * y).sum()
        y.add_(1.0)
        second = (x * y).sum()
    (first + second).backward()
    torch.testing.assert_close(x.grad, 2 * before + 1.0)


def test_a_graph_may_be_gone_through_twice():
    offload, x = Offload(nn.Identity(), CPU), torch.randn(9, requires_grad=True)
    with offload.on():
        y = x.exp().square().sum()
    once = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(*once, *torch.autograd.grad(y, x))


def test_layout_is_kept_and_the_next_one_is_called_for():
    kept = []
    offload = Offload(nn.Identity(), CPU)
    for shape in ((3, 4), (4, 3)):
        kept.append(offload._pack(torch.randn(shape).t()))
    first, second = kept
    assert first.back is None
    back = room._unpack(second)
    assert back.stride() == (1, 3)
    assert back.data_ptr() == second.host.data_ptr()  # on one device nothing has to come back
    assert first.back is not None
    assert second.back is None


def test_nothing_is_held_when_the_graph_is_gone(packed):
    runner, _ = packed
    offload = Offload(runner.model, CPU)
    with offload.on():
        hidden = runner.hidden(torch.randint(0, 64, (20,)), [20])
        last = weakref.ref(offload._last)
    hidden.square().sum().backward()
    del hidden
    gc.collect()
    assert last() is None


def test_on_the_cpu_and_with_sharding_it_is_refused():
    with pytest.raises(ConfigError, match="makes no sense on 'cpu'") as caught:
        require_offloadable(TrainConfig(offload="activations"), CPU)
    assert "run again" in caught.value.hint
    with pytest.raises(ConfigError, match="sharding"):
        require_offloadable(TrainConfig(offload="activations", sharding="full"), torch.device("cuda"))
    for harmless in ("auto", "none"):
        require_offloadable(TrainConfig(offload=harmless), CPU)
    with pytest.raises(ConfigError, match="offload must be one of auto, none, activations"):
        TrainConfig(offload="disk")


def test_auto_offloads_where_nothing_else_fits():
    memory = MemoryModel(
        present=2**30,
        trained=0,
        kept_per_token=2.0**20,
        loose_per_token=0.0,
        least_per_token=2.0**14,
        vocabulary=1000,
        blocks=32,
        on_gpu=True,
    )
    longest = 4096
    offloaded = memory.suited("activations", longest, 0)
    everything, all_again = memory.ledger(longest).total, memory.ledger(longest, memory.blocks).total
    assert offloaded.ledger(longest, memory.blocks).total < all_again < everything
    assert not memory.suited("auto", longest, all_again).offloaded
    assert memory.suited("auto", longest, all_again - 1).offloaded
    assert not memory.suited("none", longest, 0).offloaded
