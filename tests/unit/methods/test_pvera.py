"""PVeRA: what is drawn has the mean and the variance that the input decides, and both halves learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.methods.pvera import PVeRA


def made(sample: str) -> tuple[nn.Module, addenda.Handle]:
    model = nn.Sequential(nn.Linear(10, 3))
    handle = addenda.attach(model, PVeRA(rank=4, sample=sample), targets=["0"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model, handle


def moments(handle: addenda.Handle, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the added part for one input, from the formula, in float64."""
    adapter = handle.adapters["0"]
    h = adapter.d.double() * (adapter.common.A.double() @ x.double())
    out = adapter.b.double()[:, None] * adapter.common.B.double()
    return out @ h[:4], out @ torch.diag(torch.exp(h[4:])) @ out.t()


def test_training_draws_with_the_stated_mean_and_covariance() -> None:
    torch.manual_seed(0)
    model, handle = made("training")
    x = torch.randn(10)
    mean, covariance = moments(handle, x)
    with torch.no_grad():
        drawn = (model(x.expand(200_000, 10)) - model[0].original_class.forward(model[0], x)).double()
    size = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() < 0.02 * size).all()
    assert ((torch.cov(drawn.t()) - covariance).abs() < 0.03 * size[:, None] * size).all()


@pytest.mark.parametrize(("sample", "draws"), [("training", False), ("always", True), ("never", False)])
def test_outside_training_only_always_draws(sample: str, draws: bool) -> None:
    model, handle = made(sample)
    model.eval()
    x = torch.randn(10)
    assert torch.equal(model(x), model(x)) != draws
    if not draws:
        expected = model[0].original_class.forward(model[0], x).double() + moments(handle, x)[0]
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_spread_learns_too() -> None:
    model, handle = made("training")
    model(torch.randn(6, 10)).square().sum().backward()
    assert (handle.adapters["0"].d.grad.abs() > 0).all()
