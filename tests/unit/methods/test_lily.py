"""Lily: who shares what, and the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import addenda
from addenda.core.handle import handles
from addenda.errors import CheckpointError
from addenda.export.peft import TENSORS, import_peft, write_peft
from addenda.methods.lily import Lily


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_neighbours_share_A_and_a_family_shares_B() -> None:
    model = nn.Sequential(*[Layer() for _ in range(5)])
    handle = addenda.attach(model, Lily(rank=3, stride=2, experts=4))
    ups = [handle.adapters[f"{i}.up"].factors() for i in range(5)]
    downs = [handle.adapters[f"{i}.down"].factors() for i in range(5)]
    for family in (ups, downs):
        assert [next(j for j in range(5) if family[j][0] is A) for A, _ in family] == [0, 0, 2, 2, 4]
        assert all(B is family[0][1] for _, B in family)
    assert ups[0][0] is not downs[0][0]
    assert ups[0][1] is not downs[0][1]
    per_family = [3 * 3 * 6 + 4 * 3 * 9 + 5 * 4 * 3, 3 * 3 * 9 + 4 * 3 * 6 + 5 * 4 * 3]
    assert handle.trainable_parameters == sum(per_family)


def test_it_computes_the_formula() -> None:
    model = nn.Sequential(nn.Linear(7, 5)).double()
    handle = addenda.attach(model, Lily(rank=3, experts=2, scaling=1.5), targets=["0"])
    adapter = handle.adapters["0"]
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    A, B = adapter.factors()
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    h = torch.einsum("ri,bti->btr", A, x)
    scores = torch.einsum("er,btr->bte", adapter.router, h).exp()
    p = (scores / scores.sum(-1, keepdim=True)).mean((0, 1))
    added = sum(p[e] * torch.einsum("ro,btr->bto", B[e], h) for e in range(2))
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), base + 1.5 * added, rtol=1e-12, atol=1e-12)


def test_a_folder_whose_layers_share_otherwise_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(*[Layer() for _ in range(2)])
    write_peft(addenda.attach(model, Lily(rank=3)), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.1.up.lily_A.weight"] += 1
    save_file(tensors, tmp_path / TENSORS)
    other = nn.Sequential(*[Layer() for _ in range(2)])
    with pytest.raises(CheckpointError, match=r"0\.up\.lily_A.*1\.up\.lily_A.*differ"):
        import_peft(other, tmp_path)
    assert not handles(other)
