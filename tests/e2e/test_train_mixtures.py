"""A mixture in the loop: its own parameters learn, the adapters under it stay as they were, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_tiny as tiny

import addenda
from addenda.core.contract import Method
from addenda.methods.adapter_fusion import AdapterFusion
from addenda.methods.xlora import XLoRA
from addenda.train.config import TrainConfig
from addenda.train.events import StepEvent
from addenda.train.loop import train

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = ("law", "style")


def run(
    folder: Path, method: Method, *, break_at: int | None = None, resume: bool = False, **settings: object
):
    base, losses = tiny.make_base(), []
    for name in NAMES:
        handle = addenda.attach(base.model, addenda.LoRA(rank=4), TARGETS, name=name, seed=len(name))
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    handle = addenda.attach(base.model, method, name="mix")

    def tell(event: object) -> None:
        if isinstance(event, StepEvent):
            losses.append(event.loss)
            if event.step == break_at:
                raise KeyboardInterrupt

    config = TrainConfig(
        batch_size=4, learning_rate=2e-2, save_every_steps=5, save_every_minutes=None, threads=1,
        **{"epochs": 8, **settings},
    )  # fmt: skip
    before = {name: frozen(base.model, name) for name in NAMES}
    train(base, handle, tiny.make_rows(8), [], config, run_dir=folder, on_event=tell, resume=resume)
    for name in NAMES:
        after = frozen(base.model, name)
        assert all(torch.equal(after[key], value) for key, value in before[name].items())
    return handle, losses


def frozen(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in addenda.handles(model)[name].tensors().items()}


METHODS = [
    AdapterFusion(of=NAMES),
    XLoRA(of=NAMES, hidden_size=64, layerwise=True, depth=2, size=24, temperature=0.2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_mixture_learns_over_frozen_adapters(method: Method, tmp_path: Path) -> None:
    _, losses = run(tmp_path, method, epochs=30)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_resumed_run_ends_with_the_same_bits(method: Method, tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", method)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", method, break_at=7)
    resumed, _ = run(tmp_path / "broken", method, resume=True)
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name
