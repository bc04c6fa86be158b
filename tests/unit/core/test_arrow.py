"""Arrow against its definition; its prototypes follow the adapters, and nothing else is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda
import addenda.errors
from addenda.core.arrow import prototype

NAMES = ("a", "b", "c")


def adapted(layer: nn.Module, rank: int = 3) -> nn.Sequential:
    model = nn.Sequential(layer)
    for place, name in enumerate(NAMES):
        handle = addenda.attach(model, addenda.LoRA(rank=rank + place, alpha=4.0), ["0"], name=name)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_()
    return model


def update(model: nn.Module, name: str) -> Tensor:
    """scaling B A of an adapter, (d_out, d_in)."""
    A, B, scaling = addenda.handles(model)[name].adapters["0"].low_rank_term()
    return (scaling * B @ A).detach()


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_a_prototype_is_what_the_update_lengthens_most(rank: int) -> None:
    A, B = torch.randn(rank, 12), torch.randn(9, rank)
    v, found = torch.linalg.svd((B @ A).double()).Vh[0], prototype(A, B).double()
    torch.testing.assert_close((v @ found).abs(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_a_token_gets_the_updates_that_react_to_it_most(top_k: int) -> None:
    model, x = adapted(nn.Linear(12, 9)).double(), torch.randn(2, 5, 12).double()
    addenda.activate(model, None)
    base = model(x)
    addenda.activate(model, addenda.Arrow(NAMES, top_k=top_k, temperature=0.7))
    found = model(x)
    updates = [update(model, name) for name in NAMES]
    prototypes = [torch.linalg.svd(each).Vh[0] for each in updates]
    for row in range(2):
        for token in range(5):
            t = x[row, token]
            reactions = torch.stack([(v @ t).abs() for v in prototypes])
            chosen = reactions.argsort(descending=True)[: min(top_k, 3)]
            shares = torch.exp(reactions[chosen] / 0.7)
            shares = shares / shares.sum()
            wanted = base[row, token] + sum(s * (updates[n] @ t) for s, n in zip(shares, chosen, strict=True))
            torch.testing.assert_close(found[row, token], wanted, rtol=1e-5, atol=1e-5)


def test_one_adapter_alone_is_itself_on_every_kind_of_layer() -> None:
    cases = [
        (nn.Linear(12, 9), torch.randn(4, 12)),
        (nn.Embedding(12, 9), torch.randint(12, (4, 3))),
        (nn.Conv2d(3, 9, 2), torch.randn(2, 3, 5, 5)),
    ]
    for layer, x in cases:
        model = adapted(layer)
        addenda.activate(model, "b")
        alone = model(x)
        addenda.activate(model, addenda.Arrow(("b",)))
        torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-4)


def test_prototypes_follow_the_adapters() -> None:
    model, x = adapted(nn.Linear(12, 9)), torch.randn(6, 12)
    addenda.activate(model, addenda.Arrow(NAMES, top_k=1))
    before = model(x)
    assert torch.equal(model(x), before)
    adapter = addenda.handles(model)["a"].adapters["0"]
    with torch.no_grad():
        adapter.A.normal_()
        adapter.B.normal_()
    moved = model(x)
    assert not torch.allclose(moved, before)
    fresh = adapted(nn.Linear(12, 9))
    fresh.load_state_dict(model.state_dict())
    addenda.activate(fresh, addenda.Arrow(NAMES, top_k=1))
    torch.testing.assert_close(fresh(x), moved)


def test_gradients_reach_the_adapters_and_the_input() -> None:
    model, x = adapted(nn.Linear(12, 9)).double(), torch.randn(6, 12).double().requires_grad_()
    addenda.activate(model, addenda.Arrow(NAMES, top_k=2))
    assert torch.autograd.gradcheck(model, (x,), atol=1e-5)
    model(x).square().sum().backward()
    assert all(p.grad is not None for handle in addenda.handles(model).values() for p in handle.parameters())


def test_a_half_precision_base_is_routed_in_float32() -> None:
    model, x = adapted(nn.Linear(12, 9)), torch.randn(6, 12)
    x = x.bfloat16().float()
    model[0].weight.data = model[0].weight.bfloat16().float()
    model[0].bias.data = model[0].bias.bfloat16().float()
    addenda.activate(model, addenda.Arrow(NAMES, top_k=1))
    wanted = model(x)
    model[0].weight.data, model[0].bias.data = model[0].weight.bfloat16(), model[0].bias.bfloat16()
    found = model(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=5e-2)


def test_it_is_saved_with_the_adapters_and_comes_back(tmp_path: Path) -> None:
    model, x = adapted(nn.Linear(12, 9)), torch.randn(6, 12)
    addenda.activate(model, addenda.Arrow(NAMES, top_k=2, temperature=0.5))
    expected = model(x)
    addenda.save_all(model, tmp_path / "all")
    for name in NAMES:
        addenda.detach(model, name)
    addenda.load_all(model, tmp_path / "all")
    assert addenda.core.active_composition(model) == addenda.Arrow(NAMES, top_k=2, temperature=0.5)
    assert torch.equal(model(x), expected)


def test_what_cannot_be_routed_to_is_refused() -> None:
    for settings in ({"top_k": 0}, {"temperature": 0.0}):
        with pytest.raises(addenda.errors.ConfigError, match="must be"):
            addenda.Arrow(NAMES, **settings)
    with pytest.raises(addenda.errors.ConfigError, match="each once"):
        addenda.Arrow(("a", "b"), general=("a",))
    model, x = adapted(nn.Linear(12, 9)), torch.randn(6, 12)
    with (
        pytest.raises(addenda.errors.MethodError, match="differ in rank"),
        addenda.activated(model, addenda.Arrow(("a",), general=("b",))),
    ):
        model(x)
    addenda.attach(model, addenda.Bottleneck(size=2), ["0"], name="d")
    with (
        pytest.raises(addenda.errors.MethodError, match="'d', which is no low-rank term"),
        addenda.activated(model, addenda.Arrow(("a", "d"))),
    ):
        model(x)
    grouped = adapted(nn.Conv2d(4, 8, 2, groups=2))
    with (
        pytest.raises(addenda.errors.MethodError, match="in groups"),
        addenda.activated(grouped, addenda.Arrow(NAMES)),
    ):
        grouped(torch.randn(1, 4, 5, 5))
