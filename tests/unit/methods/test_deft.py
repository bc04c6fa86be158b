"""DEFT and PaRa: what is taken out is gone."""

from __future__ import annotations

import torch
from torch import nn

import addenda
from addenda.methods.deft import DEFT
from addenda.methods.para import PaRa


def test_the_orthogonal_projection_leaves_nothing_of_its_subspace_and_the_rest_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(24, 20)).double()
    adapter = addenda.attach(model, PaRa(rank=5), targets=["0"]).adapters["0"]
    weight = model[0].weight.detach()
    folded = adapter.fold(weight, None)[0].detach()
    inside, upper = torch.linalg.qr(adapter.P.detach(), mode="complete")
    assert upper.shape == (20, 5)
    assert float((inside[:, :5].t() @ folded).abs().max()) < 1e-12
    torch.testing.assert_close(inside[:, 5:].t() @ folded, inside[:, 5:].t() @ weight)
    assert int(torch.linalg.matrix_rank(folded)) == 15


def test_what_deft_injects_takes_the_place_of_what_it_removes() -> None:
    model = nn.Sequential(nn.Linear(24, 20)).double()
    adapter = addenda.attach(model, DEFT(rank=5, projection="orthogonal"), targets=["0"]).adapters["0"]
    injected = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        adapter.R.copy_(injected)
    basis = torch.linalg.qr(adapter.P.detach())[0]
    folded = adapter.fold(model[0].weight.detach(), None)[0].detach()
    torch.testing.assert_close(basis.t() @ folded, injected)
