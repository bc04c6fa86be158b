"""Poly gives each row the mixture of its task under PEFT as here, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import addenda
from addenda.export.peft import import_peft, write_peft
from addenda.methods.poly import Poly, on_tasks

peft = pytest.importorskip("peft")

TASKS = [2, 0, 1, 2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def stir(parameters: Iterable[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.7 * torch.randn_like(parameter))


@pytest.mark.parametrize("splits", [1, 2])
def test_our_adapter_answers_the_same_under_peft(
    splits: int, tmp_path: Path, differing: Callable[..., float]
) -> None:
    model, x = Net().eval(), torch.randn(4, 5, 12)
    handle = addenda.attach(model, Poly(rank=3, tasks=3, skills=5, splits=splits))
    stir(handle.parameters())
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    with on_tasks(handle, TASKS):
        wanted = model(x)
    answer = theirs.base_model(x, task_ids=torch.tensor(TASKS))
    assert differing(handle, "written", answer, wanted) <= 1e-5
    assert (wanted - Net()(x)).abs().max() > 1e-2


@pytest.mark.parametrize("splits", [1, 4])
def test_their_adapter_answers_the_same_here(
    splits: int, tmp_path: Path, differing: Callable[..., float]
) -> None:
    config = peft.PolyConfig(r=2, n_tasks=3, n_skills=3, n_splits=splits, target_modules=["first", "second"])
    theirs, x = peft.get_peft_model(Net(), config).eval(), torch.randn(4, 5, 12)
    stir(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    model = Net().eval()
    handle = import_peft(model, tmp_path)
    with on_tasks(handle, TASKS):
        answer = theirs.base_model(x, task_ids=torch.tensor(TASKS))
        assert differing(handle, "read", model(x), answer) <= 1e-5
