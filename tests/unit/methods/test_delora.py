"""DeLoRA: what its name promises, strength apart from direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.methods.delora import DeLoRA


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_the_update_is_bounded_by_the_strength_whatever_the_factors_become(size: float) -> None:
    model = nn.Sequential(nn.Linear(24, 20)).double()
    adapter = addenda.attach(model, DeLoRA(rank=5, strength=3.0), targets=["0"]).adapters["0"]
    with torch.no_grad():
        for factor in (adapter.A, adapter.B):
            factor.copy_(torch.randn_like(factor) * size)
        weight = torch.zeros(20, 24, dtype=torch.float64)
        update = adapter.fold(weight, None)[0] / adapter.norms
    assert 0.5 < float(update.norm()) <= 3.0
    with torch.no_grad():
        adapter.A.mul_(7.0)
        adapter.B.mul_(0.3)
    torch.testing.assert_close(adapter.fold(weight, None)[0] / adapter.norms, update)


def test_the_norms_are_those_of_the_base_at_the_start() -> None:
    model = nn.Sequential(nn.Linear(24, 20))
    adapter = addenda.attach(model, DeLoRA(rank=5), targets=["0"]).adapters["0"]
    torch.testing.assert_close(adapter.norms, model[0].weight.square().sum(0).sqrt())
