"""The LoRA family beyond conformance: LoRA+'s rates, LoRA-FA's frozen factor and what it need not keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.core.sharing import shared_linear
from addenda.methods.hira import HiRA
from addenda.methods.lora_fa import LoRAFA


def kept_bytes(run: object) -> int:
    """Bytes of the tensors that autograd keeps for a backward, views of one storage once."""
    held: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()  # type: ignore[operator]
    return sum(held.values())


def test_b_rate_is_for_b_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    handle = addenda.attach(model, addenda.LoRA(rank=2, b_rate=16.0, bias=True))
    assert {name: handle.rate_of(name) for name, _ in handle.named_parameters()} == {
        "0.A": 1.0,
        "0.B": 16.0,
        "0.bias": 1.0,
    }


def test_a_frozen_a_keeps_no_input_and_gives_the_same_gradient_of_b() -> None:
    layer, x = nn.Linear(256, 64), torch.randn(100, 256, requires_grad=True)
    models = {name: nn.Sequential(nn.Linear(256, 64)) for name in ("lora", "fa")}
    grads, bytes_kept = {}, {}
    for name, method in {"lora": addenda.LoRA(rank=4), "fa": LoRAFA(rank=4)}.items():
        models[name][0].load_state_dict(layer.state_dict())
        handle = addenda.attach(models[name], method, seed=3)
        nn.init.normal_(handle.adapters["0"].B, generator=torch.Generator().manual_seed(1))
        bytes_kept[name] = kept_bytes(lambda name=name: models[name](x))
        models[name](x).square().sum().backward()
        grads[name] = (handle.adapters["0"].B.grad, x.grad)
        x.grad = None
    for ours, theirs in zip(grads["fa"], grads["lora"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert bytes_kept["lora"] - bytes_kept["fa"] == x.numel() * 4


def test_layers_that_share_an_input_keep_none_of_it_either() -> None:
    model = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 16)])
    handle = addenda.attach(model, LoRAFA(rank=2), targets=["0", "1"])
    for adapter in handle.adapters.values():
        nn.init.normal_(adapter.B)
    x = torch.randn(50, 64)
    assert kept_bytes(lambda: shared_linear(list(model), x)) < x.numel() * 4
    factors = [adapter.B for adapter in handle.adapters.values()]
    together = torch.autograd.grad(sum(y.square().sum() for y in shared_linear(list(model), x)), factors)
    apart = torch.autograd.grad(sum(layer(x).square().sum() for layer in model), factors)
    for got, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_second_derivative_without_the_input_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    handle = addenda.attach(model, LoRAFA(rank=2))
    nn.init.normal_(handle.adapters["0"].B)
    x = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(addenda.TrainingError, match="does not keep its input"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_hira_keeps_no_matrix_as_large_as_the_weight() -> None:
    model, x = nn.Sequential(nn.Linear(128, 96)), torch.randn(5, 128)
    addenda.attach(model, HiRA(rank=2))
    assert kept_bytes(lambda: model(x)) < 96 * 128 * 4


def test_the_rank_of_hiras_update_is_not_bound_by_the_rank_of_its_factors() -> None:
    layer = nn.Linear(20, 20).double()
    handle = addenda.attach(nn.Sequential(layer), HiRA(rank=2))
    nn.init.normal_(handle.adapters["0"].B)
    update = handle.folded("0")[0] - layer.weight
    assert torch.linalg.matrix_rank(update) == 20
