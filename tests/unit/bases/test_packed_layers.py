"""Packed layers compute what dense ones with the unpacked weight compute, in both directions and under LoRA."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import addenda
from addenda.bases import formats, packed_layers
from addenda.bases.packed_layers import PackedEmbedding, PackedLinear
from addenda.core import fingerprint
from addenda.errors import MethodError
from addenda.kernels.library import enable, kernels_off

FORMATS = ["NF4", "INT8"]


@pytest.fixture(params=["kernel", "plain"], autouse=True)
def either_form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with the kernels and without."""
    if request.param == "plain":
        with kernels_off():
            yield
    elif enable():
        yield
    else:
        pytest.skip("no compiler on this machine")


@pytest.fixture(params=[50, 10_000], autouse=True, ids=["many tiles", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut weights into tiles of one row, and into one tile."""
    monkeypatch.setattr(packed_layers, "TILE", request.param)


def packed_linear(name: str, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> PackedLinear:
    raw = formats.get(name).quantize(torch.randn(24, 128))
    return PackedLinear(raw, formats.get(name), 128, torch.randn(24).to(dtype) if bias else None, dtype)


def dense_twin(layer: PackedLinear) -> nn.Linear:
    dense = nn.Linear(128, 24, bias=layer.bias is not None, dtype=layer.compute_dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.weight_format.dequantize(layer.raw, 128))
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


def close(x: Tensor, y: Tensor, share: float = 1e-6) -> bool:
    return x.dtype == y.dtype and bool((x - y).float().norm() <= share * y.float().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_input_gradient_are_those_of_the_unpacked_weight(name: str, *, bias: bool) -> None:
    layer = packed_linear(name, bias=bias)
    x = torch.randn(3, 5, 128, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense_twin(layer)(twin)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    assert close(y, expected)
    assert close(x.grad, twin.grad)


@pytest.mark.parametrize("name", FORMATS)
def test_in_bfloat16_both_are_within_its_rounding(name: str) -> None:
    layer = packed_linear(name, dtype=torch.bfloat16)
    weight, x, g = layer.dequantized().double(), torch.randn(7, 128).bfloat16(), torch.randn(7, 24).bfloat16()
    assert close(layer.linear(x).double(), x.double() @ weight.t(), 3e-3)
    assert close(layer.grad_input(g).double(), g.double() @ weight, 3e-3)
    total = torch.randn(7, 128).bfloat16()
    wanted = total.double() + g.double() @ weight
    assert close(layer.add_grad_input(total, g).double(), wanted, 3e-3)


def test_nothing_is_kept_for_the_backward_and_rows_of_none_cost_nothing() -> None:
    layer = packed_linear("NF4")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        layer(torch.randn(4, 128, requires_grad=True))
    assert not saved
    assert layer(torch.empty(0, 128)).shape == (0, 24)


def test_an_embedding_looks_up_the_unpacked_rows() -> None:
    raw = formats.get("NF4").quantize(torch.randn(40, 64))
    table = formats.get("NF4").dequantize(raw, 64)
    ids = torch.randint(0, 40, (3, 7))
    assert torch.equal(PackedEmbedding(raw, formats.get("NF4"), 64)(ids), functional.embedding(ids, table))
    scaled = PackedEmbedding(raw, formats.get("NF4"), 64, 3.3, torch.bfloat16)(ids)
    factor = torch.tensor(3.3, dtype=torch.bfloat16)
    assert torch.equal(scaled, functional.embedding(ids, table.bfloat16()) * factor)


@pytest.mark.parametrize("name", FORMATS)
def test_lora_on_packed_layers_has_the_gradients_of_lora_on_dense_ones(name: str) -> None:
    layers = [packed_linear(name, bias=True) for _ in range(2)]
    packed = nn.ModuleDict({"a": layers[0], "b": layers[1]})
    dense = nn.ModuleDict({"a": dense_twin(layers[0]), "b": dense_twin(layers[1])})
    x = torch.randn(6, 128)
    found = []
    for model in (packed, dense):
        handle = addenda.attach(model, addenda.LoRA(rank=4), targets="all-linear", seed=3)
        with torch.no_grad():
            for index, (_, parameter) in enumerate(handle.named_parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(index))
        loss = (model["a"](x) * model["b"](x)).square().sum()
        loss.backward()
        found.append((handle, [loss, *(p.grad for p in handle.parameters())]))
    assert [n for n, _ in found[0][0].named_parameters()] == [n for n, _ in found[1][0].named_parameters()]
    assert all(close(x, y, 1e-5) for x, y in zip(found[0][1], found[1][1], strict=True))


def test_the_fingerprint_is_that_of_the_dense_layer_and_changes_with_the_bytes() -> None:
    layer = packed_linear("NF4", bias=True)
    before = fingerprint(nn.Sequential(layer))
    assert before == fingerprint(nn.Sequential(dense_twin(layer)))
    assert before == fingerprint(nn.Sequential(layer).to(torch.bfloat16))
    layer.raw[5, 11] ^= 0xF0
    assert fingerprint(nn.Sequential(layer)) != before


def test_adapters_are_saved_loaded_and_not_merged(tmp_path: object) -> None:
    layer = packed_linear("INT8")
    model, other = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
    before = layer.raw.clone()
    handle = addenda.attach(model, addenda.LoRA(rank=2), targets="all-linear")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    addenda.save(model, f"{tmp_path}/adapter")
    addenda.load(other, f"{tmp_path}/adapter")
    x = torch.randn(5, 128)
    assert torch.equal(model(x), other(x))
    with pytest.raises(MethodError, match="keeps a quantized weight"):
        handle.merge()
    handle.detach()
    assert type(model[0]) is PackedLinear
    assert torch.equal(layer.raw, before)


def test_a_layer_compiles() -> None:
    layer = packed_linear("NF4")
    x = torch.randn(4, 128)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert close(compiled(x), layer(x))
