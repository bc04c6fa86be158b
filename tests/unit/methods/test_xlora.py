"""X-LoRA against its formula; its first passes with a cache, in blocks that run again, and where they are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import addenda
import addenda.errors
from addenda.bases.packed import PackedModel
from addenda.methods.xlora import XLoRA

NAMES = ("law", "style")
TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1))


def make() -> nn.Module:
    """A small Llama in float64 with two stirred adapters, of which the second is on fewer layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval().double()
    for place, name in enumerate(NAMES):
        stirred(addenda.attach(model, addenda.LoRA(rank=4), TARGETS[place:], name=name))
    return model


def stirred(handle: addenda.Handle) -> addenda.Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return handle


def mixed(model: nn.Module, **settings: object) -> addenda.Handle:
    return stirred(addenda.attach(model, XLoRA(of=NAMES, hidden_size=32, **settings), name="mix"))


def by_hand(model: nn.Module, gates: torch.Tensor, weight: float) -> torch.Tensor:
    """Logits where the layer at place l adds ``weight * gates[..., l, n]`` times what adapter n adds."""
    law, style = (addenda.handles(model)[name] for name in NAMES)
    hooks = []
    for place, path in enumerate(law.paths):
        layer = model.get_submodule(path)

        def change(module, args, output, place=place, path=path):
            added = 0.0
            for n, handle in enumerate((law, style)):
                if path in handle.paths:
                    A, B, scaling = handle.adapters[path].low_rank_term()
                    added = added + gates[..., place, n, None] * (scaling * args[0] @ A.T @ B.T)
            return output + weight * added

        hooks.append(layer.register_forward_hook(change))
    try:
        with addenda.activated(model, None):
            return model(IDS).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "settings", [{}, {"softmax": False, "top_k": 1}, {"top_k": 2, "softmax_of_top": True}]
)
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_logits_are_those_of_gates_from_a_first_pass(
    settings: dict[str, object], layerwise: bool, depth: int
) -> None:
    model = make()
    with addenda.activated(model, None):
        inner = model.model(IDS).last_hidden_state
    handle = mixed(model, layerwise=layerwise, depth=depth, size=5, temperature=0.5, weight=1.5, **settings)
    network = next(iter(handle.adapters.values())).common
    for place, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        inner = inner @ weight.T + bias
        inner = inner.relu() if place < depth - 1 else inner
    gates = inner.view(3, 9, -1, 2).expand(3, 9, 4, 2)
    if settings.get("softmax", True):
        gates = (gates / 0.5).softmax(-1)
    if settings.get("top_k") == 1:
        gates = torch.where(gates == gates.amax(-1, keepdim=True), gates, 0.0)
    if settings.get("softmax_of_top"):
        gates = gates.softmax(-1)
    torch.testing.assert_close(model(IDS).logits, by_hand(model, gates, 1.5))


def test_the_first_pass_may_mix_by_a_constant() -> None:
    model = make()
    constant = torch.full((3, 9, 4, 2), 0.7).double()
    with addenda.activated(model, None):
        logits = by_hand(model, constant, 1.0)
    seen = []
    handle = mixed(model, first_value=0.7)
    hook = model.model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state)
    )
    model(IDS)
    hook.remove()
    torch.testing.assert_close(model.lm_head(seen[0]), logits)
    assert not torch.allclose(seen[0], seen[1])
    assert handle.active


@torch.no_grad()
def test_text_goes_on_a_token_at_a_time_as_in_whole_passes() -> None:
    model = make()
    mixed(model, temperature=0.1)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(IDS),
    }
    whole = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(model.generate(IDS, **settings), whole)
    wanted = model(IDS).logits
    cache = model(IDS[:, :4]).past_key_values
    fork = copy.deepcopy(cache)  # both know of their first passes
    for held in (cache, fork):
        torch.testing.assert_close(model(IDS[:, 4:], past_key_values=held).logits, wanted[:, 4:])
    own = DynamicCache(config=model.config)
    for start in (0, 3, 6):
        part = model(IDS[:, start : start + 3], past_key_values=own).logits
        torch.testing.assert_close(part, wanted[:, start : start + 3])


def test_a_cache_that_it_cannot_follow_is_refused() -> None:
    model = make()
    cache = model(IDS[:, :4]).past_key_values
    mixed(model)
    with pytest.raises(addenda.errors.MethodError, match="without the first passes"):
        model(IDS[:, 4:], past_key_values=cache)
    with pytest.raises(addenda.errors.MethodError, match="rearranged"):
        model.generate(
            IDS, num_beams=2, max_new_tokens=3, pad_token_id=0, attention_mask=torch.ones_like(IDS)
        )
    with pytest.raises(addenda.errors.MethodError, match="was not about those"):
        model.model.layers[0].self_attn.q_proj(torch.randn(2, 32).double())


def test_there_is_one_pass_where_it_does_not_run() -> None:
    model = make()
    handle, count = mixed(model), []
    model.model.layers[0].register_forward_hook(lambda *_: count.append(1))
    model(IDS)
    assert len(count) == 2
    with handle.disabled():
        model(IDS)
    assert len(count) == 3
    handle.detach()
    model(IDS)
    assert len(count) == 4


def test_dropout_is_one_mask_for_all_layers_and_for_blocks_that_run_again() -> None:
    model = make()
    handle = mixed(model, depth=2, size=6, dropout=0.5)
    plain = model(IDS).logits
    model.train()
    torch.manual_seed(4)
    model(IDS).logits.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in handle.named_parameters()}
    assert not torch.allclose(model(IDS).logits, plain)
    model.zero_grad()
    model.activation_checkpointing_enable()
    torch.manual_seed(4)
    model(IDS).logits.square().sum().backward()
    for name, parameter in handle.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_what_it_cannot_do_is_refused() -> None:
    model = make()
    for settings, problem in (
        ({}, "hidden_size has to be the model's"),
        ({"hidden_size": 32, "top_k": 3}, "top_k is 3, of 2 adapters"),
    ):
        with pytest.raises(addenda.errors.MethodError, match=problem):
            addenda.plan(model, XLoRA(of=NAMES, **settings))
    with pytest.raises(addenda.errors.MethodError, match="no adapter 'law' to mix"):
        addenda.plan(model, XLoRA(of=NAMES, hidden_size=32), ["k_proj"])
    for settings in ({"depth": 0}, {"dropout": 1.0}, {"temperature": 0.0}, {"softmax": 1}):
        with pytest.raises(addenda.errors.ConfigError, match=next(iter(settings))):
            XLoRA(of=NAMES, **settings)


def test_packed_rows_give_the_gradients_of_single_samples_with_blocks_that_run_again() -> None:
    model = make().float()
    handle = mixed(model, depth=2, size=6, layerwise=True)
    packed, row, lengths = PackedModel(model), IDS.flatten(), [9, 4, 14]
    assert packed.path == "packed"
    assert packed.blocks == 2

    def gradients(states: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (share * packed.logits(states).square().mean()).backward()
        return {name: p.grad.clone() for name, p in handle.named_parameters()}

    wanted: dict[str, torch.Tensor] = {}
    singles = []
    for ids in row.split(lengths):  # one pass and its backward after another, as first passes ask
        states = packed.hidden_alone(ids)
        singles.append(states.detach())
        for name, gradient in gradients(states, len(ids) / len(row)).items():
            wanted[name] = wanted.get(name, 0.0) + gradient
    for recompute in (0, 2):
        states = packed.hidden(row, lengths, recompute=recompute)
        torch.testing.assert_close(states.detach(), torch.cat(singles), rtol=1e-4, atol=1e-4)
        for name, gradient in gradients(states, 1.0).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)
