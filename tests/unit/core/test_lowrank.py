from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import addenda
from addenda.core.layers import view_of
from addenda.core.lowrank import low_rank_linear
from addenda.core.remaking import remakable


def formula(
    x: torch.Tensor, layer: nn.Linear, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    return x @ (layer.weight + scaling * B @ A).T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
def test_fused_equals_the_float64_formula_in_value_and_gradient(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(10, 6, bias=bias).double().requires_grad_(False)
    tensors = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((*shape, 10), (3, 10), (6, 3))
    ]
    got = low_rank_linear(*tensors, scaling=1.7, base=view_of(layer, "layer"))
    wanted = formula(tensors[0], layer, *tensors[1:], 1.7)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got, tensors, g), torch.autograd.grad(wanted, tensors, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", [2.0, 0.5, 16 / 8**0.5, 64 / 8**0.5, 0.7])
def test_in_float32_the_bits_are_those_of_the_plain_operations(scaling: float) -> None:
    """PEFT adds the scaled product; a rounding that differs grows to 1e-4 of a logit through thirty layers."""
    layer = nn.Linear(64, 48).requires_grad_(False)
    x, A, B = torch.randn(33, 64), torch.randn(8, 64), torch.randn(48, 8)
    got = low_rank_linear(x, A, B, scaling=scaling, base=view_of(layer, "layer"))
    assert torch.equal(got, layer(x) + F.linear(F.linear(x, A), B) * scaling)


def test_fused_passes_gradcheck() -> None:
    layer = nn.Linear(4, 3).double().requires_grad_(False)
    view = view_of(layer, "layer")
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4), (3, 2))]
    assert torch.autograd.gradcheck(lambda x, A, B: low_rank_linear(x, A, B, scaling=0.5, base=view), inputs)


def test_second_derivatives_are_right() -> None:
    layer = nn.Linear(4, 3).double().requires_grad_(False)
    view = view_of(layer, "layer")
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4), (3, 2))]
    assert torch.autograd.gradgradcheck(
        lambda x, A, B: low_rank_linear(x, A, B, scaling=0.5, base=view).square(), inputs
    )


def test_nested_tensors_take_the_general_path() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    rows = [torch.randn(n, 4) for n in (2, 5)]
    with torch.no_grad():
        out = model(torch.nested.nested_tensor(rows, layout=torch.jagged)).unbind()
        for got, row in zip(out, rows, strict=True):
            torch.testing.assert_close(got, model(row))


def test_no_gradient_is_made_for_an_input_that_needs_none() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    x = torch.randn(5, 4)
    low_rank_linear(x, A, B, scaling=1.0, base=view_of(layer, "layer")).sum().backward()
    assert x.grad is None
    assert A.grad is not None


def test_saved_for_backward_is_the_input_and_its_thin_product_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    addenda.attach(model, addenda.LoRA(rank=4), "all-linear")
    x = torch.randn(100, 64, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sorted(t.shape for t in saved) == sorted([(100, 64), (100, 4), (4, 64), (48, 4)])


def test_under_autocast_and_with_a_trained_weight_the_general_path_gives_the_right_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    for p in handle.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    model[0].weight.requires_grad_(True)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, x.sum(0).expand(8, 8))


def test_an_input_that_can_be_made_again_is_not_kept_and_the_gradients_are_the_same_bits() -> None:
    layer = nn.Linear(10, 6).requires_grad_(False)
    view, kept = view_of(layer, "layer"), []
    z, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((7, 10), (3, 10), (6, 3)))

    def gradients(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = low_rank_linear(x, A, B, scaling=0.5, base=view)
        return torch.autograd.grad(y.square().sum(), (x, A, B))

    x = z.tanh()
    wanted = gradients(x)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
    kept.clear()
    ours = gradients(remakable(x, torch.tanh, z))
    assert not any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
    for got, same in zip(ours, wanted, strict=True):
        assert torch.equal(got, same)
