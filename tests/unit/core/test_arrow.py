"""Arrow: low-rank adapters mixed for each token by prototypes that are computed from their factors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.arrow import leading_right_vector
from addenda.errors import ConfigError, MethodError, TargetError

NAMES = ("law", "style", "code")


def make_model(method: addenda.Method | None = None) -> nn.Sequential:
    """A model in float64 with three adapters of a trained size, on the first layer all, on the last one two of them."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    for rank, name in enumerate(NAMES, start=1):
        targets = ["0", "2"] if name != "style" else ["0"]
        handle = addenda.attach(model, method or addenda.LoRA(rank=rank), targets, name=name)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def by_the_formula(layer: Any, x: Tensor, top_k: int, temperature: float) -> Tensor:
    """One layer, token by token, with whole updates and a whole singular value decomposition."""
    adapters = [layer.adapters[name] for name in NAMES if name in layer.adapters]
    updates = [adapter.scaling * adapter.B @ adapter.A for adapter in adapters]
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        near = [abs(float(torch.linalg.svd(update)[2][0] @ token)) for update in updates]
        chosen = sorted(range(len(near)), key=lambda i: -near[i])[:top_k]
        total = sum(math.exp(near[i] / temperature) for i in chosen)
        change = sum(math.exp(near[i] / temperature) / total * updates[i] @ token for i in chosen)
        rows.append(layer.weight @ token + layer.bias + change)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0), (9, 1.0)])
def test_it_is_the_papers_formula(top_k: int, temperature: float) -> None:
    model, x = make_model(), torch.randn(2, 7, 6).double()
    addenda.activate(model, addenda.Arrow(NAMES, top_k=top_k, temperature=temperature))
    inner = by_the_formula(model[0], x, top_k, temperature)
    torch.testing.assert_close(model(x), by_the_formula(model[2], inner.tanh(), top_k, temperature))


def test_a_prototype_is_the_direction_of_the_largest_response() -> None:
    for rank in (1, 3, 6):
        A, B = torch.randn(rank, 6).double(), torch.randn(9, rank).double()
        found, wanted = leading_right_vector(A, B), torch.linalg.svd(B @ A)[2][0]
        torch.testing.assert_close(found * (found @ wanted).sign(), wanted)


def test_prototypes_are_made_once_and_anew_when_a_value_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "addenda.core.arrow.leading_right_vector", lambda A, B: made.append(A) or leading_right_vector(A, B)
    )
    model, x = make_model(), torch.randn(4, 6).double()
    addenda.activate(model, addenda.Arrow(NAMES))
    before = model(x)
    assert torch.equal(model(x), before)
    assert len(made) == 5
    with torch.no_grad():
        model[0].adapters["law"].A.neg_().add_(1.0)
    assert not torch.allclose(model(x), before)
    assert len(made) == 8
    fresh = addenda.Arrow(NAMES)
    now = model(x)
    with addenda.activated(model, fresh):
        assert torch.equal(model(x), now)


def test_general_knowledge_is_taken_off_the_factors_and_changes_no_adapter() -> None:
    model, x = make_model(addenda.LoRA(rank=2)), torch.randn(4, 6).double()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with addenda.activated(model, addenda.Arrow(("law", "code"), top_k=1, general=("style",))):
        purer = model(x)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        adapters: Any = model[0].adapters
        for name in ("law", "code"):
            for half in "AB":
                getattr(adapters[name], half).sub_(getattr(adapters["style"], half))
    with addenda.activated(model, addenda.Arrow(("law", "code"), top_k=1)):
        torch.testing.assert_close(model(x), purer)


def test_gradients_reach_the_chosen_adapters() -> None:
    model, x = make_model(), torch.randn(4, 6).double()
    addenda.activate(model, addenda.Arrow(NAMES, top_k=3))
    model(x).square().sum().backward()
    assert all(p.grad is not None for handle in addenda.handles(model).values() for p in handle.parameters())


def test_it_runs_in_the_layers_dtype_and_compiled() -> None:
    model, x = make_model().bfloat16(), torch.randn(4, 6).bfloat16()
    addenda.activate(model, addenda.Arrow(NAMES, top_k=2))
    assert model(x).dtype == torch.bfloat16
    model, x = model.float(), x.float()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model[0].adapters["law"].A.neg_().add_(1.0)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_it_is_saved_with_all_adapters_and_comes_back(tmp_path: Path) -> None:
    model, x = make_model(), torch.randn(4, 6).double()
    addenda.activate(model, addenda.Arrow(NAMES, top_k=2, temperature=0.7))
    expected = model(x)
    folder = addenda.save_all(model, tmp_path / "adapters")
    for handle in list(addenda.handles(model).values()):
        handle.detach()
    addenda.load_all(model, folder)
    assert torch.equal(model(x), expected)


def test_detaching_one_leaves_the_others_mixed() -> None:
    model, x = make_model(), torch.randn(4, 6).double()
    addenda.activate(model, addenda.Arrow(NAMES))
    addenda.detach(model, "style")
    found = model(x)
    with addenda.activated(model, addenda.Arrow(("law", "code"))):
        assert torch.equal(model(x), found)
    addenda.detach(model, "law")
    addenda.detach(model, "code")
    assert type(model[0]) is nn.Linear


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    for wrong in ({"top_k": 0}, {"temperature": 0.0}, {"of": ()}, {"of": ("a", "a")}, {"general": ("law",)}):
        with pytest.raises(ConfigError) as caught:
            addenda.Arrow(**{"of": ("law",), **wrong})
        assert caught.value.hint
    model, x = make_model(), torch.randn(4, 6).double()
    odd = pytest.raises(MethodError, match="'law' has rank 1 at '0', and general adapters have rank 3")
    with addenda.activated(model, addenda.Arrow(("law",), general=("code",))), odd:
        model(x)
    addenda.attach(model, addenda.BitFit(), name="shift")
    with addenda.activated(model, addenda.Arrow(("shift",))), pytest.raises(MethodError, match="'shift'"):
        model(x)
    conv = nn.Sequential(nn.Conv1d(4, 4, 3))
    addenda.attach(conv, addenda.LoRA(rank=2), ["0"], name="law")
    with (
        addenda.activated(conv, addenda.Arrow(("law",))),
        pytest.raises(TargetError, match="cannot be routed"),
    ):
        conv(torch.randn(2, 4, 9))
