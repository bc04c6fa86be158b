"""DoRA's norms come from products of the frozen weight; here they are taken of the whole matrix, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import MethodError
from addenda.methods.dora import DoRA
from addenda.methods.hira import HiRA


def reference(x: torch.Tensor, layer: nn.Linear, adapter: nn.Module, scaling: float) -> torch.Tensor:
    """Equation 5 with equation 11's constant norm, in float64 and in one piece."""
    A, B, m = (getattr(adapter, name).double() for name in ("A", "B", "m"))
    V = layer.weight.double() + scaling * B @ A
    y = x.double() @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_the_papers_formula(
    bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = nn.Sequential(nn.Linear(9, 7, bias=bias)).to(dtype)
    handle = addenda.attach(model, DoRA(rank=3, alpha=5.0), targets=["0"])
    adapter = handle.adapters["0"]
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    x = torch.randn(11, 9, dtype=dtype)
    wanted = reference(x, model[0], adapter, 5.0 / 3)
    torch.testing.assert_close(model(x).double(), wanted, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(wanted)
    parameters = list(handle.parameters())
    theirs = torch.autograd.grad(wanted, parameters, g)
    ours = torch.autograd.grad(model(x), parameters, g.to(dtype))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_lengths_are_kept_where_only_the_direction_is_trained() -> None:
    layer = nn.Linear(16, 12)
    before = layer.weight.detach().norm(dim=1)
    handle = addenda.attach(nn.Sequential(layer), DoRA(rank=4), targets=["0"])
    nn.init.normal_(handle.adapters["0"].B)
    weight, _ = handle.folded("0")
    torch.testing.assert_close(weight.norm(dim=1), before, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_stays_one() -> None:
    layer = nn.Linear(8, 5)
    nn.init.zeros_(layer.weight[2])
    model, x = nn.Sequential(layer), torch.randn(3, 8)
    before = model(x)
    addenda.attach(model, DoRA(rank=2), targets=["0"])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reader", [DoRA(rank=2), HiRA(rank=2)], ids=["dora", "hira"])
def test_nothing_is_folded_in_below_what_goes_by_the_weight(reader: addenda.Method) -> None:
    model, x = nn.Sequential(nn.Linear(8, 5)), torch.randn(3, 8)
    below = addenda.attach(model, addenda.LoRA(rank=2), name="below")
    on_top = addenda.attach(model, reader, name="top")
    with torch.no_grad():
        for parameter in (*below.parameters(), *on_top.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = model(x)
    with pytest.raises(MethodError, match="goes by the weight"):
        below.merge()
    assert torch.equal(model(x), before)
    on_top.detach()
    below.merge()
    merged, on_top = model(x), addenda.attach(model, reader, name="top")
    torch.testing.assert_close(model(x), merged, rtol=0, atol=1e-6)
    with pytest.raises(MethodError, match="goes by the weight"):
        below.unmerge()
    on_top.merge()
    on_top.unmerge()
    torch.testing.assert_close(model(x), merged, rtol=0, atol=1e-6)
