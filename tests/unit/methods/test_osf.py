"""OSF: gradients have nothing along the directions that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.methods.osf import OSF


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 20), (20, 24), (20, 20)])
def test_gradients_are_orthogonal_to_what_is_kept_and_else_as_they_were(d_in: int, d_out: int) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    adapter = addenda.attach(model, OSF(kept=6), targets=["0"]).adapters["0"]
    with torch.no_grad():
        for factor in (adapter.U, adapter.S, adapter.V):
            factor.add_(0.3 * torch.randn_like(factor))
    weight = model[0].weight.detach()
    target = torch.randn(d_out, d_in, dtype=torch.float64)
    (adapter.fold(weight, None)[0] * target).sum().backward()
    left, _, right = torch.linalg.svd(weight)
    high_U, high_V = left[:, :6], right[:6]
    assert float((high_U.t() @ adapter.U.grad).abs().max()) < 1e-10
    assert float((adapter.V.grad @ high_V.t()).abs().max()) < 1e-10
    plain = target @ (adapter.S.detach()[:, None] * adapter.V.detach()).t()
    torch.testing.assert_close(adapter.U.grad, plain - high_U @ (high_U.t() @ plain))
    plain = (adapter.U.detach() * adapter.S.detach()).t() @ target
    torch.testing.assert_close(adapter.V.grad, plain - plain @ high_V.t() @ high_V)


def test_a_share_that_keeps_all_or_nothing_is_refused() -> None:
    for kept in (20, 0.01):
        with pytest.raises(addenda.MethodError, match="some have to be kept"):
            addenda.plan(nn.Sequential(nn.Linear(24, 20)), OSF(kept=kept), ["0"])
