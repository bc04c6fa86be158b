"""A frozen weight with a dense change: the plain form's values and gradients, and nothing dense kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.changed import changed_linear
from addenda.core.layers import view_of
from addenda.methods.full import Full
from addenda.methods.shira import SHiRA


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_form(dtype: torch.dtype, biased: bool) -> None:
    layer = nn.Linear(9, 7).to(dtype)
    view, wide = view_of(layer, ""), torch.promote_types(dtype, torch.float32)
    x, D = torch.randn(2, 5, 9, dtype=dtype), torch.randn(7, 9, dtype=wide)
    bias, weight = torch.randn(7, dtype=dtype) if biased else None, torch.randn(2, 5, 7, dtype=dtype)
    found = []
    for fused in (True, False):
        inputs = [t if t is None else t.clone().requires_grad_() for t in (x, D, bias)]
        if fused:
            y = changed_linear(*inputs, view)
        else:
            total = (layer.weight.detach() + inputs[1]).to(dtype)
            y = nn.functional.linear(inputs[0], total, inputs[2])
        (y * weight).sum().backward()
        found.append([y, *(t.grad for t in inputs if t is not None)])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        loose = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(ours, plain, **loose)


@pytest.mark.parametrize("method", [Full(), SHiRA(rank=2)])
def test_nothing_as_large_as_the_weight_is_kept_but_what_is_trained(method: addenda.Method) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50))
    handle = addenda.attach(model, method, ["0", "1"])
    own = {p.data_ptr() for p in model.parameters()}
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(3, 40)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())
    assert max(kept) < 30 * 40


def test_a_gradient_penalty_on_the_input_is_refused_by_pytorch_and_not_wrong() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4, requires_grad=True)
    addenda.attach(model, Full(), "0")
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
