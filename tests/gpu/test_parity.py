"""A packed step on the GPU has the states, the loss and the gradients of the same step on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from addenda.bases.fast import attention
from addenda.bases.fast.compiled import why_not_compiled
from addenda.bases.packed import PackedModel
from addenda.bases.place import move
from addenda.bases.scores import evaluate_positions
from addenda.kernels.library import kernels_off
from addenda.train.loss import packed_loss

LENGTHS = [100, 1, 300, 60]
TOKENS = sum(LENGTHS)


def step(model, ids, *, recompute=0):
    """States, loss and gradients by name, on the CPU and in fp32."""
    device = next(model.parameters()).device
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    places, targets = torch.arange(0, TOKENS - 1, 2), ids[1::2]
    places, targets, ids = (x.to(device) for x in (places, targets, ids))
    hidden = packed.hidden(ids, LENGTHS, recompute=recompute)
    loss = packed_loss(packed, hidden, places, targets, denominator=len(targets))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    scores = evaluate_positions(packed, hidden, places, targets)
    found = {"states": hidden, "loss": loss, "nll": scores.nll, **dict(zip(named, grads, strict=True))}
    return {name: value.detach().float().cpu() for name, value in found.items()}


def far(ours, theirs):
    return {
        name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12))
        for name in theirs
    }


def test_pytorch_compiles_for_this_gpu():
    assert why_not_compiled() == ""


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_float32_gives_what_the_cpu_gives(family, recompute, made, device, monkeypatch):
    model, _ = made(family)
    twin = copy.deepcopy(model)
    move(twin, device)
    ids = torch.randint(3, 512, (TOKENS,))
    with kernels_off():
        theirs = step(model, ids)
    used = []
    flex = attention.flex_attend
    monkeypatch.setattr(attention, "flex_attend", lambda *given: used.append(1) or flex(*given))
    ours = step(twin, ids, recompute=recompute)
    assert used
    worst = far(ours, theirs)
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_as_near_to_float32_as_its_rounding(family, made, device):
    model, _ = made(family)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    move(twin, device)
    ids = torch.randint(3, 512, (TOKENS,))
    worst = far(step(twin, ids), step(model, ids))
    assert max(worst.values()) < 0.1, worst


def test_rows_of_many_lengths_need_no_new_code(made, device):
    model, handle = made("llama")
    move(model, device)
    packed = PackedModel(model)

    def there_and_back(tokens):
        ids = torch.randint(3, 512, (tokens,), device=device)
        packed.hidden(ids, [tokens // 3, tokens - tokens // 3]).sum().backward()

    for tokens in (130, 300, 520):
        there_and_back(tokens)
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (700, 1111, 2000):
            there_and_back(tokens)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in handle.parameters())
