"""What a method asks of the training loop: rates of its own, a penalty, a change after each update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.contract import Adapter, Base, Method
from addenda.train.config import TrainConfig
from addenda.train.optimizer import make_optimizer, set_learning_rate


@dataclass(frozen=True)
class Hooked(Method):
    """y = base(x) + (u + v) with a rate of 4 on v, a penalty on u, and u halved after each update."""

    def build(self, base: Base) -> Adapter:
        return HookedAdapter(base.parameter(base.d_out, init=1.0), base.parameter(base.d_out))

    def rate_of(self, parameter: str) -> float:
        return {"v": 4.0}.get(parameter, 1.0)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        return torch.stack([adapter.get_parameter("u").square().sum() for adapter in adapters.values()]).sum()

    def after_update(self, adapters: Mapping[str, Adapter], *, step: int, of_steps: int) -> None:
        for adapter in adapters.values():
            adapter.get_parameter("u").mul_(step / of_steps)


class HookedAdapter(Adapter):
    def __init__(self, u: nn.Parameter, v: nn.Parameter) -> None:
        super().__init__()
        self.u, self.v = u, v

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + self.u + self.v


@pytest.fixture
def handle() -> addenda.Handle:
    return addenda.attach(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), Hooked())


def test_a_rate_is_a_factor_on_the_learning_rate_at_every_step(handle: addenda.Handle) -> None:
    names = {p: name for name, p in handle.named_parameters()}
    optimizer = make_optimizer(names, TrainConfig(), 0.5, rate_of=lambda p: handle.rate_of(names[p]))
    for learning_rate in (0.5, 0.1):
        set_learning_rate(optimizer, learning_rate)
        found = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert found == {
            name: learning_rate * (4.0 if name.endswith("v") else 1.0) for name in names.values()
        }


def test_the_penalty_is_over_all_layers_and_has_a_gradient(handle: addenda.Handle) -> None:
    penalty = handle.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == 4.0
    penalty.backward()
    grads = {name: p.grad for name, p in handle.named_parameters()}
    assert all(torch.equal(grads[f"{path}.u"], torch.full((2,), 2.0)) for path in "01")
    assert grads["0.v"] is None


def test_after_an_update_the_method_may_change_the_adapter(handle: addenda.Handle) -> None:
    handle.after_update(step=1, of_steps=4)
    assert all(torch.equal(handle.adapters[path].u, torch.full((2,), 0.25)) for path in "01")
    assert handle.adapters["0"].u.requires_grad


def test_a_method_without_hooks_asks_for_nothing() -> None:
    plain = addenda.attach(nn.Sequential(nn.Linear(3, 2)), addenda.LoRA(rank=1))
    assert plain.penalty() is None
    assert plain.rate_of("0.A") == 1.0
