"""AdamW with averages in 8 bits: asked for by name, lazily imported, and resumed to the bit."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import ConfigError, MissingDependencyError
from addenda.train.config import TrainConfig
from addenda.train.optimizer import make_optimizer
from addenda.train.state import load_optimizer, optimizer_tensors

CONFIG = TrainConfig(optimizer="adamw8bit", weight_decay=0.01)


def test_an_unknown_optimizer_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="optimizer must be one of adamw, adamw8bit, got 'sgd'"):
        TrainConfig(optimizer="sgd")  # type: ignore[arg-type]


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError) as caught:
        make_optimizer([nn.Parameter(torch.ones(2, 2))], CONFIG, 0.1)
    assert "addenda[quantized]" in caught.value.hint


def model_and_handle() -> tuple[nn.Module, addenda.Handle]:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(512, 24), nn.Linear(24, 512))
    return model, addenda.attach(model, addenda.LoRA(rank=16), "all-linear", seed=2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[torch.Tensor]) -> None:
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def loss(model: nn.Module, x: torch.Tensor) -> float:
    return float((model(x) - x).square().mean())


def test_large_matrices_have_averages_of_one_byte_and_learn_as_with_four() -> None:
    pytest.importorskip("bitsandbytes")
    inputs = [torch.randn(64, 512) for _ in range(40)]
    losses = []
    for config in (CONFIG, TrainConfig(weight_decay=0.01)):
        model, handle = model_and_handle()
        optimizer = make_optimizer(handle.parameters(), config, 1e-3)
        start = loss(model, inputs[0])
        steps(model, optimizer, inputs)
        losses.append(loss(model, inputs[0]))
        if config is CONFIG:
            kept = {n: optimizer.state[p]["state1"].dtype for n, p in handle.named_parameters()}
            assert kept == {
                "0.A": torch.uint8,
                "0.B": torch.float32,
                "1.A": torch.float32,
                "1.B": torch.uint8,
            }
    assert losses[1] < start
    assert abs(losses[0] - losses[1]) < 0.1 * (start - losses[1])


def test_a_resumed_run_takes_the_same_steps_to_the_bit() -> None:
    pytest.importorskip("bitsandbytes")
    inputs = [torch.randn(8, 512) for _ in range(9)]
    model, handle = model_and_handle()
    optimizer = make_optimizer(handle.parameters(), CONFIG, 1e-2)
    steps(model, optimizer, inputs[:5])
    kept = {k: v.clone() for k, v in optimizer_tensors(handle, optimizer).items()}
    values = [p.detach().clone() for p in handle.parameters()]
    steps(model, optimizer, inputs[5:])

    again, other = model_and_handle()
    for parameter, value in zip(other.parameters(), values, strict=True):
        parameter.data.copy_(value)
    fresh = make_optimizer(other.parameters(), CONFIG, 1e-2)
    load_optimizer(other, fresh, kept)
    steps(again, fresh, inputs[5:])
    for found, expected in zip(other.parameters(), handle.parameters(), strict=True):
        assert torch.equal(found, expected)
    for key, value in optimizer_tensors(handle, optimizer).items():
        assert torch.equal(optimizer_tensors(other, fresh)[key], value), key
