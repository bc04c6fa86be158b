"""VeLoRA: the gradients of PEFT's, and of LoRA where nothing is lost; what is kept until the backward."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import addenda
from addenda.methods.velora import VeLoRA, VeLoRAAdapter

D_IN, D_OUT = 14, 9
WORDS = {"once": "batch_average_once", "each": "batch_average", "random": "random"}


def adapted(model: nn.Module, **settings: object) -> VeLoRAAdapter:
    handle = addenda.attach(model, VeLoRA.from_settings({"rank": 3, "alpha": 5.0, **settings}), targets=["0"])
    adapter = handle.adapters["0"]
    nn.init.normal_(adapter.B)
    return adapter


def gradients(model: nn.Module, adapter: VeLoRAAdapter, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [x, adapter.A, adapter.B]))


@pytest.mark.parametrize("direction", ["once", "each", "random"])
@pytest.mark.parametrize("groups", [1, 4, 7, 14])
def test_the_gradients_are_pefts(direction: str, groups: int) -> None:
    base = nn.Sequential(nn.Linear(D_IN, D_OUT))
    compression = peft.VeloraConfig(num_groups=groups, scale=0.7, init_type=WORDS[direction])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], velora_config=compression)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    layer = theirs.get_submodule("base_model.model.0")
    ours = adapted(base, groups=groups, scale=0.7, direction=direction)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.A)
        layer.lora_B["default"].weight.copy_(ours.B)
        if direction == "random":
            ours.v.copy_(layer.lora_velora_embed["default"])
    for _ in range(2):
        x = torch.randn(2, 5, D_IN) + 0.5
        other = x.clone().requires_grad_()
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        wanted = torch.autograd.grad(theirs(other).square().sum(), [other, *factors])
        for found, expected in zip(gradients(base, ours, x), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.v, layer.lora_velora_embed["default"])


def test_groups_of_one_feature_lose_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(D_IN, D_OUT)).double(), torch.randn(6, D_IN, dtype=torch.float64)
    compressed = adapted(model, groups=D_IN, direction="random")
    found = gradients(model, compressed, x)
    A, B = compressed.A, compressed.B
    other = x.clone().requires_grad_()
    y = model[0]._addenda.view(other) + 5.0 / 3 * other @ A.t() @ B.t()
    wanted = torch.autograd.grad(y.square().sum(), [other, A, B])
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


def test_the_input_is_not_kept_for_the_backward() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).requires_grad_(False)
    adapted(model, groups=2, direction="once")
    x, kept = torch.randn(50, D_IN), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum()
    assert not any(t.data_ptr() == x.data_ptr() or t.shape == x.shape for t in kept)
    assert any(t.shape == (50, 2) for t in kept)


def test_a_direction_is_taken_once_by_training_alone_and_again_under_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter, x = adapted(model, groups=2, direction="once"), torch.randn(8, D_IN)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert not adapter.v.any()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    first, grad = adapter.v.clone(), adapter.A.grad.clone()
    torch.testing.assert_close(first.norm(), torch.tensor(1.0))
    torch.testing.assert_close(gradients(model, adapter, x)[1], grad)
    model(torch.randn(8, D_IN))
    assert torch.equal(adapter.v, first)
