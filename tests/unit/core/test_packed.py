"""Packed linear layers: fused as plain ones are, one fingerprint whatever the packing, the words for linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.fingerprints import fingerprint
from addenda.core.layers import kind_of
from addenda.core.lowrank import frozen_linear
from addenda.core.sharing import shared_linear, term_of
from addenda.errors import MethodError


class Halved(nn.Module):
    """A packed layer that keeps its weight as the sum of two halves, of which the first may be any share."""

    def __init__(self, linear: nn.Linear, share: float = 0.5) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("first", (linear.weight * share).detach())
        self.register_buffer("second", linear.weight.detach() - self.first)
        self.bias = linear.bias
        self.products = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.first.dtype

    def dequantized(self, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.first + self.second
        return (weight if rows is None else weight[rows]).to(dtype or self.compute_dtype)

    def linear(self, x: Tensor) -> Tensor:
        self.products += 1
        return nn.functional.linear(x, self.dequantized(), self.bias)

    def grad_input(self, g: Tensor) -> Tensor:
        return g @ self.dequantized()

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        return total.addmm_(g, self.dequantized())

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


def pair(bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """The same two layers, dense and packed."""
    dense = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Linear(16, 6, bias=bias)).double()
    return dense, nn.Sequential(*(Halved(layer) for layer in dense))


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_model_answers_and_learns_as_the_dense_one(bias: bool) -> None:
    dense, packed = pair(bias)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    gradients = []
    for model in (dense, packed):
        handle = addenda.attach(model, addenda.LoRA(rank=3), "all-linear", seed=4, probe=x)
        generator = torch.Generator().manual_seed(1)
        for parameter in handle.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        rows = x.clone().requires_grad_()
        model(rows).square().sum().backward()
        gradients.append([rows.grad, *(p.grad for p in handle.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kind_of(packed[0]).name == "packed-linear"


def test_without_an_adapter_the_input_gradient_is_the_dense_one() -> None:
    dense, packed = pair()
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(packed(x).square().sum(), x), expected)
    assert torch.autograd.gradcheck(packed, x)


def test_packed_layers_share_one_node() -> None:
    layers = [Halved(nn.Linear(12, width).double()) for width in (8, 4, 4)]
    model = nn.ModuleList(layers)
    addenda.attach(model, addenda.LoRA(rank=2), ["0", "1"])  # the third runs without an adapter
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert all(term_of(layer, x) is not None for layer in layers)
    outputs = shared_linear(layers, x)
    assert len({y.grad_fn for y in outputs}) == 1
    for layer, y in zip(layers, outputs, strict=True):
        torch.testing.assert_close(y, layer(x))


def test_the_fingerprint_knows_the_weight_and_not_its_packing() -> None:
    dense, packed = pair()
    other = nn.Sequential(*(Halved(layer, share=0.25) for layer in dense))
    assert fingerprint(packed) == fingerprint(other) == fingerprint(dense)
    addenda.attach(packed, addenda.LoRA(rank=2), "all-linear")
    assert fingerprint(packed) == fingerprint(dense)
    other[1].first[2, 3] += 1.0
    assert fingerprint(other) != fingerprint(dense)


def test_integer_tensors_are_fingerprinted_by_their_values() -> None:
    module = nn.Module()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int64, torch.bool):
        module.register_buffer(f"codes_{dtype}".replace(".", "_"), torch.ones(3, 5, dtype=dtype))
    before = fingerprint(module)
    for name, buffer in module.named_buffers():
        buffer[1, 2] = 0
        assert fingerprint(module) != before, name
        buffer[1, 2] = 1
    assert fingerprint(module) == before


def test_a_merge_into_a_packed_weight_is_refused_before_anything_changes() -> None:
    dense, packed = pair()
    model = nn.Sequential(dense[0], packed[1])
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear", seed=3)
    weight = dense[0].weight.detach().clone()
    with pytest.raises(MethodError, match=r"'1' \(Halved\) keeps a quantized weight") as caught:
        handle.merge()
    assert "beside its base" in caught.value.hint
    assert torch.equal(dense[0].weight, weight)
    assert not handle.merged
