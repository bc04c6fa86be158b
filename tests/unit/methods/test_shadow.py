"""ShadowPEFT: what its mirror is, what becomes of a cache, and which blocks have which parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.methods.shadow import Shadow

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(61, (2, 8))


def stirred(model: nn.Module, name: str = "default", **settings: object) -> addenda.Handle:
    handle = addenda.attach(model, Shadow(rank=3, alpha=1.0, **settings), name=name)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return handle


def test_a_mirror_is_a_small_base_that_begins_as_one(model: nn.Module) -> None:
    [adapter] = addenda.attach(model, Shadow(layers=2)).adapters.values()
    blocks = model.model.layers
    assert len(adapter.mirror.layers) == 2
    for ours, theirs in zip(adapter.mirror.layers, blocks, strict=False):
        own, base = (dict(block.named_parameters()) for block in (ours, theirs))
        assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in base.items()}
        for name, value in own.items():  # norms at one, weights of the class's own deviation
            assert not torch.equal(value, base[name]) or "norm" in name
            torch.testing.assert_close(value.std(), base[name].std(), rtol=0.2, atol=1e-3)
    assert adapter.mirror.embed_tokens is None
    assert adapter.down.shape == (3, 8, 32)
    assert adapter.gate_out.shape == (2, 32, 8)


def test_every_block_is_steered_by_the_shadow_of_the_same_tokens(model: nn.Module, ids: Tensor) -> None:
    handle = stirred(model)
    [adapter] = handle.adapters.values()
    read, made, hooks = [], [], []
    for block in model.model.layers:
        hooks.append(block.register_forward_pre_hook(lambda _, args: read.append(args[0])))
        hooks.append(block.register_forward_hook(lambda _, args, y: made.append(y)))
    model(ids)
    for hook in hooks:
        hook.remove()
    hidden = model.get_input_embeddings()(ids)
    state = adapter.mirror(inputs_embeds=hidden).last_hidden_state
    for block, (x, y) in enumerate(zip(read, made, strict=True)):
        apart = (hidden - state) @ adapter.down[block].t() @ adapter.up[block].t()
        torch.testing.assert_close(x, hidden + apart, rtol=1e-4, atol=1e-4)
        hidden = y
        if block < 2:
            state = adapter.update(block, y, state)


def test_two_shadows_keep_their_places_in_one_cache(model: nn.Module, ids: Tensor) -> None:
    for name in ("a", "b"):
        stirred(model, name, layers=2 if name == "b" else 1)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :3]).past_key_values
        assert len(cache.layers) == 3 + 1 + 2
        assert {layer.keys.shape[-2] for layer in cache.layers} == {3}
        rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 8)]
    torch.testing.assert_close(torch.cat(rest, dim=1), whole[:, 3:], rtol=1e-4, atol=1e-4)


def test_beams_choose_the_shadows_rows_with_the_bases(model: nn.Module, ids: Tensor) -> None:
    stirred(model)
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached, again)


def test_a_cache_that_was_filled_without_the_shadow_is_refused(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        cache = model(ids).past_key_values
        stirred(model)
        with pytest.raises(addenda.errors.MethodError, match="nothing of the shadow"):
            model(ids[:, :1], past_key_values=cache)


def test_dropout_is_of_the_difference_alone(model: nn.Module, ids: Tensor) -> None:
    handle = stirred(model, dropout=0.5)
    assert not torch.allclose(model.train()(ids).logits, model(ids).logits)
    with torch.no_grad():
        for adapter in handle.adapters.values():
            adapter.up.zero_()
    torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)
