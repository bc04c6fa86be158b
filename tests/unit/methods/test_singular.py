"""KaSA and MiCA: which singular components they give up or write into, and KaSA's penalty."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.methods.kasa import KaSA
from addenda.methods.mica import MiCA


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(14, 11).double()


def test_mica_writes_into_the_least_directions_and_trains_a_alone(layer: nn.Linear) -> None:
    handle = addenda.attach(nn.Sequential(layer), MiCA(rank=3), targets=["0"])
    adapter = handle.adapters["0"]
    values, vectors = torch.linalg.eigh(layer.weight @ layer.weight.t())  # rising
    assert values[0] < values[3]
    torch.testing.assert_close(adapter.B @ adapter.B.t(), vectors[:, :3] @ vectors[:, :3].t())
    assert [name for name, _ in handle.named_parameters()] == ["0.A"]


def test_kasa_begins_at_the_best_approximation_of_the_weight(layer: nn.Linear) -> None:
    weight, bias = layer.weight.detach().clone(), layer.bias
    model = nn.Sequential(layer)
    addenda.attach(model, KaSA(rank=4), targets=["0"])
    identity = torch.eye(14, dtype=torch.float64)
    left = (model(identity) - bias).t()
    assert torch.linalg.matrix_rank(left) == 7
    rest = torch.linalg.svdvals(weight)[7:].square().sum().sqrt()  # no matrix of rank 7 is nearer
    torch.testing.assert_close(torch.linalg.matrix_norm(weight - left), rest)


def test_dropout_leaves_what_is_taken_off_as_it_is(layer: nn.Linear) -> None:
    model, x = nn.Sequential(layer), torch.randn(5, 14, dtype=torch.float64)
    handle = addenda.attach(model, KaSA(rank=4, dropout=0.5), targets=["0"])
    assert torch.allclose(model.train()(x), model.eval()(x), rtol=1e-12, atol=1e-12)  # B is zero
    nn.init.normal_(handle.adapters["0"].B)
    assert not torch.allclose(model.train()(x), model.eval()(x))


def test_the_penalty_is_pefts(layer: nn.Linear) -> None:
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(14, 11), nn.Linear(11, 9)),
        peft.LoraConfig(r=3, target_modules=["0", "1"], kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7)),
    )
    ours = nn.Sequential(nn.Linear(14, 11), nn.Linear(11, 9))
    handle = addenda.attach(ours, KaSA(rank=3, beta=0.3, gamma=0.7), targets=["0", "1"])

    def values(path: str) -> list[Tensor]:
        wrapped = theirs.get_submodule(f"base_model.model.{path}")
        return [
            wrapped.lora_A["default"].weight,
            wrapped.lora_B["default"].weight,
            wrapped.lora_diag["default"],
        ]

    with torch.no_grad():
        for path, adapter in handle.adapters.items():
            for own, other in zip((adapter.A, adapter.B, adapter.values), values(path), strict=True):
                own.copy_(other.normal_())
    torch.testing.assert_close(handle.penalty(), theirs._get_kasa_loss())
    handle.penalty().backward()
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())


def test_nothing_of_the_weight_may_be_left_over(layer: nn.Linear) -> None:
    with pytest.raises(addenda.errors.MethodError, match="leaves nothing"):
        addenda.attach(nn.Sequential(layer), KaSA(rank=11), targets=["0"])
