"""Compacter against the paper's formula in float64, its Kronecker products written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import addenda
from addenda.methods.compacter import Compacter


def written_out(adapter: nn.Module, name: str, rule: Tensor) -> Tensor:
    """sum_i A_i (x) (s_i t_i) as one matrix."""
    s, t = adapter.get_parameter(f"{name}.s"), adapter.get_parameter(f"{name}.t")
    return sum(torch.kron(A, s_i @ t_i) for A, s_i, t_i in zip(rule, s, t, strict=True))


def test_it_computes_the_papers_formula() -> None:
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 18)).double()
    x, method = torch.randn(5, 10).double(), Compacter(size=6, division=3, rank=2)
    handle = addenda.attach(model, method, ["0", "1"])
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    expected = x
    for layer, adapter in zip(model, handle.adapters.values(), strict=True):
        h = nn.functional.linear(expected, layer.weight, layer.bias)
        down, up = (written_out(adapter, name, adapter.common.A) for name in ("down", "up"))
        inner = nn.functional.gelu(h @ down.t() + adapter.down.bias)
        expected = h + inner @ up.t() + adapter.up.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_first_factors_are_those_of_all_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    handle = addenda.attach(model, Compacter(size=4, division=2), "all-linear")
    assert [name for name, _ in handle.named_parameters() if name.startswith("*")] == ["*.A"]
    per_layer = 3 * (4 + 8)
    assert handle.trainable_parameters == 2 * per_layer + 2**3
