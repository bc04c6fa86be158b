from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.bases.packed import PackedModel
from addenda.memory.arena import Arena, empty, product
from addenda.train.loss import packed_loss
from addenda.train.memory import measure_memory

FLOAT = torch.empty(0)


def test_a_piece_is_used_again_when_its_storage_is_gone():
    arena = Arena(2**20)
    with arena.serving():
        first = empty((64, 64), FLOAT)
        place, view = first.data_ptr(), first[3:5].t()
        del first
        second = empty((64, 64), FLOAT)
        assert second.data_ptr() != place  # the view still reads the first
        del view
        assert empty((64, 64), FLOAT).data_ptr() == place
    assert second.data_ptr() % 64 == 0


def test_no_two_living_tensors_overlap():
    arena, rng = Arena(2**22), random.Random(torch.initial_seed())
    living = {}
    with arena.serving():
        for number in range(3000):
            tensor = empty((rng.randint(1, 40), rng.randint(100, 900)), FLOAT, torch.bfloat16).fill_(
                number % 251
            )
            living[number] = tensor
            while len(living) > rng.randint(0, 60):
                del living[rng.choice(list(living))]
        for number, tensor in living.items():
            assert bool((tensor == number % 251).all())
        assert any(arena.holds(tensor) for tensor in living.values())
    living.clear()
    del tensor
    assert arena.used == 0
    assert arena._free == [(0, 2**22)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_a_tensor_of_it_is_an_ordinary_one(dtype):
    with Arena(2**20).serving():
        tensor = empty((3, 50, 100), FLOAT, dtype)
    plain = torch.empty(3, 50, 100, dtype=dtype)
    for name in ("shape", "dtype", "device", "requires_grad", "_base"):
        assert getattr(tensor, name) == getattr(plain, name)
    assert tensor.stride() == plain.stride()
    assert tensor.untyped_storage().nbytes() >= plain.untyped_storage().nbytes()
    if dtype.is_floating_point:
        tensor.zero_().requires_grad_()
        (tensor * 2).sum().backward()
        assert bool((tensor.grad == 2).all())


def test_what_does_not_fit_comes_from_the_heap():
    arena = Arena(100_000)
    with arena.serving():
        large, small = empty((1000, 1000), FLOAT), empty((2, 2), FLOAT)
        fits = empty((100, 100), FLOAT)
    assert [arena.holds(x) for x in (large, small, fits)] == [False, False, True]
    with Arena(0).serving():
        assert empty((100, 100), FLOAT).shape == (100, 100)


def test_it_serves_within_the_block_alone():
    arena = Arena(2**20)
    with pytest.raises(RuntimeError, match="in the middle"), arena.serving():
        raise RuntimeError("in the middle")
    assert not arena.holds(empty((100, 100), FLOAT))
    assert arena.used == 0


def test_an_arena_may_go_before_its_tensors():
    arena = Arena(2**20)
    with arena.serving():
        tensor = empty((100, 100), FLOAT).fill_(3.0)
    del arena
    assert float(tensor.sum()) == 30_000.0


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_has_the_same_bits(with_bias):
    x, weight = torch.randn(64, 48), torch.randn(80, 48)
    bias = torch.randn(80) if with_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(product(x, weight.t(), bias), expected)
    arena = Arena(2**20)
    with arena.serving():
        differentiable = product(x.requires_grad_(), weight.t(), bias)
        with torch.no_grad():
            made = product(x, weight.t(), bias)
    assert torch.equal(made, expected)
    assert arena.holds(made)
    assert differentiable.requires_grad


# ------------------------------------------------------------------------------------------------- under a whole model


@pytest.fixture
def small():
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    handle = addenda.attach(model, addenda.LoRA(rank=4), "all-linear")
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return handle, PackedModel(model)


def step(small, ids, *, recompute=0):
    handle, packed = small
    hidden = packed.hidden(ids, [len(ids) - 40, 40], recompute=recompute)
    at = torch.arange(0, len(ids), 2)
    loss = packed_loss(packed, hidden, at, ids[at], denominator=len(at))
    return hidden, loss, [p for p in handle.parameters() if p.requires_grad]


def gradients(small, ids, **how):
    _, loss, parameters = step(small, ids, **how)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("recompute", [0, 2])
def test_loss_and_gradients_have_the_same_bits(small, recompute):
    arena = Arena(2**24)
    for tokens in (100, 200, 130):
        ids = torch.randint(0, 64, (tokens,))
        expected = gradients(small, ids, recompute=recompute)
        with arena.serving():
            ours = gradients(small, ids, recompute=recompute)
        assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    del ours
    assert arena.used == 0


def test_a_graph_that_is_kept_is_not_written_over(small):
    arena, (ids, others) = Arena(2**24), torch.randint(0, 64, (2, 100))
    expected = gradients(small, ids)
    with arena.serving():
        hidden, loss, parameters = step(small, ids)
        held, states = arena.used, hidden.detach().clone()
        assert held > 0
        gradients(small, others)
        assert arena.used >= held
        ours = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    assert torch.equal(hidden, states)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_the_share_of_what_a_forward_keeps_outside_of_it_is_measured(small):
    handle, packed = small
    arena, sizes = Arena(2**24), {True: {}, False: {}}
    weights = {p.untyped_storage().data_ptr() for p in packed.model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[arena.holds(tensor)][storage.data_ptr()] = storage.nbytes()
        return tensor

    with arena.serving(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed.hidden(torch.randint(0, 64, (512,)), [512])
    inside, outside = (sum(sizes[place].values()) for place in (True, False))
    memory = measure_memory(handle, packed)
    assert 512 * memory.kept_per_token == pytest.approx(inside + outside, rel=0.1)
    assert 512 * memory.loose_per_token == pytest.approx(outside, rel=0.1)
    assert inside > 0.4 * outside


def test_an_error_in_the_middle_leaves_it_whole(small):
    arena, ids = Arena(2**24), torch.randint(0, 64, (100,))
    expected, layer = gradients(small, ids), small[1].model.model.layers[1].mlp.down_proj

    def fail(*_):
        raise ValueError("no more")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no more"), arena.serving():
        step(small, ids)
    hook.remove()
    assert arena.used == 0
    with arena.serving():
        assert all(torch.equal(x, y) for x, y in zip(gradients(small, ids), expected, strict=True))
