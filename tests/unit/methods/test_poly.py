"""Poly and MHR: each row gets the mixture of its task, with PEFT's answers, and the noise that the papers add."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import MethodError
from addenda.methods.poly import Poly, on_tasks

TASKS = [2, 0, 1, 2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def stirred(model: nn.Module, method: Poly) -> addenda.Handle:
    handle = addenda.attach(model, method)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return handle


def test_a_batch_of_several_tasks_gives_each_row_what_its_task_gives_alone() -> None:
    model = Net().double().eval()
    handle = stirred(model, Poly(rank=3, tasks=3, splits=2))
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    with on_tasks(handle, TASKS):
        together = model(x)
    values = {name: p.detach().clone() for name, p in handle.named_parameters()}
    for task in range(3):
        alone = Net().double().eval()
        own = addenda.attach(alone, Poly(rank=3, tasks=3, splits=2, task=task))
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter.copy_(values[name])
        mine = torch.tensor(TASKS) == task
        torch.testing.assert_close(together[mine], alone(x)[mine], rtol=1e-12, atol=1e-12)
        own.merge()
        torch.testing.assert_close(together[mine], alone(x)[mine], rtol=1e-9, atol=1e-9)


def test_training_draws_a_relaxed_bernoulli_gate_for_each_row() -> None:
    torch.manual_seed(1)
    two = stirred(nn.Sequential(nn.Linear(4, 4)).train(), Poly(rank=1, skills=2)).adapters["0"]
    with torch.no_grad():
        two.A.zero_()
        two.A[:, 0] = 1.0
        two.z.copy_(torch.tensor([[-0.8, 0.5]]))
        drawn, _ = two._mixed(torch.zeros(100_000, dtype=torch.int64), noise=True)
        gates = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=two.z[0]).sample((100_000,))
    share = gates[:, 0] / gates.sum(-1)
    quantiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(
        drawn[:, 0, 0].quantile(quantiles), share.quantile(quantiles), rtol=0, atol=0.01
    )


def test_tasks_that_do_not_fit_are_refused() -> None:
    model = Net()
    handle = addenda.attach(model, Poly(rank=2, tasks=3))
    for wrong in ([0, 3], [-1], [0.5], [[0, 1]]):
        with pytest.raises(MethodError, match="whole numbers below 3"), on_tasks(handle, wrong):
            pass
    with (
        pytest.raises(MethodError, match="2 tasks were told for a batch of 4 rows"),
        on_tasks(handle, [0, 1]),
    ):
        model(torch.randn(4, 5, 12))
    other = addenda.attach(Net(), addenda.LoRA(rank=2))
    with pytest.raises(MethodError, match="of method 'lora'"), on_tasks(other, [0]):
        pass
