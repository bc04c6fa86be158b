"""Observing a model: what is counted, what is refused, and that nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda import LoRA
from addenda.core import Progress
from addenda.core.decomposition import leading_svd
from addenda.errors import ConfigError, MethodError, TargetError


class Sequence(nn.Module):
    """Rows of features, a second path that is not always taken, and a loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor] | Tensor:
        y = self.second(torch.tanh(self.first(x)))
        if labels is None:
            return y

        class Output(dict):
            loss = nn.functional.cross_entropy(y.flatten(0, 1), labels.flatten())

        return Output(logits=y)


TARGETS = ["first", "second"]
METHOD = {"inputs": LoRA(rank=2, start="corda"), "gradients": LoRA(rank=2, start="lora_ga")}


@pytest.fixture
def model() -> Sequence:
    return Sequence()


def covariance(rows: Tensor) -> Tensor:
    rows = rows / rows.abs().max()
    return rows.t() @ rows


def test_positions_that_are_masked_or_carry_no_loss_do_not_count(model: Sequence) -> None:
    x = torch.randn(3, 5, 6)
    mask, labels = torch.rand(3, 5) < 0.7, torch.randint(4, (3, 5))
    labels[torch.rand(3, 5) < 0.3] = -100
    batch = {"x": x, "attention_mask": mask.long(), "labels": labels}
    kept = mask & (labels != -100)
    for given in (batch, (lambda m: m(x), kept.flatten())):
        found = addenda.observe(model, METHOD["inputs"], TARGETS, [given])
        torch.testing.assert_close(found.layers["first"]["covariance"], covariance(x[kept]))
    shorter = (lambda m: m(x), torch.ones(4, dtype=torch.bool))  # what lies behind the mask is filling
    found = addenda.observe(model, METHOD["inputs"], TARGETS, [shorter])
    torch.testing.assert_close(found.layers["first"]["covariance"], covariance(x.flatten(0, 1)[:4]))


def test_the_gradient_is_that_of_the_mean_loss_over_batches(model: Sequence) -> None:
    batches = [{"x": torch.randn(2, 3, 6), "labels": torch.randint(4, (2, 3))} for _ in range(3)]
    found = addenda.observe(model, METHOD["gradients"], TARGETS, batches)
    losses = torch.stack([model(**batch).loss for batch in batches])
    for path in TARGETS:
        (expected,) = torch.autograd.grad(losses.mean(), model.get_submodule(path).weight, retain_graph=True)
        torch.testing.assert_close(found.layers[path]["gradient"], expected)


@pytest.mark.parametrize("needs", ["inputs", "gradients"])
def test_nothing_of_it_stays(model: Sequence, needs: str) -> None:
    other = addenda.attach(model, LoRA(rank=1), ["first", "aside"], name="other")
    model.train()
    model.first.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    batch = {"x": torch.randn(2, 3, 6), "labels": torch.randint(4, (2, 3))}
    addenda.observe(model, METHOD[needs], TARGETS, [batch])
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.first.training) == (True, False)
    assert type(model.second) is nn.Linear
    assert other.paths == ["first", "aside"]


def test_what_fails_leaves_the_model_as_it_was(model: Sequence) -> None:
    def broken(_: nn.Module) -> None:
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        addenda.observe(model, METHOD["inputs"], TARGETS, [broken])
    assert type(model.first) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_what_it_lacks_is_said(model: Sequence) -> None:
    x = torch.randn(2, 3, 6)
    cases = [
        (LoRA(rank=2), [x], {}, MethodError, "observes nothing"),
        (METHOD["inputs"], [x], {"original": model}, MethodError, "observes inputs"),
        (LoRA(rank=2, start="loftq"), [x], {}, MethodError, "observes original"),
        (METHOD["gradients"], [{"x": x}], {}, MethodError, "gave no loss"),
        (LoRA(rank=4, start="eva"), [x[:1, :1]], {}, MethodError, "vary in 0 directions"),
        (METHOD["inputs"], [x * float("nan")], {}, MethodError, "not finite"),
        (METHOD["inputs"], [], {}, TargetError, "nothing was observed"),
        (
            LoRA(rank=2, start="loftq"),
            [],
            {"original": copy.deepcopy(model)},
            MethodError,
            "no layer differs",
        ),
        (LoRA(rank=2, start="loftq"), [], {"original": nn.Sequential()}, TargetError, "has no layer 'first'"),
    ]
    for method, batches, more, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            addenda.observe(model, method, TARGETS, batches, **more)
        assert caught.value.hint
        assert type(model.first) is nn.Linear
    with pytest.raises(TargetError, match="nothing was observed of 'aside'"):
        addenda.observe(model, METHOD["inputs"], ["aside"], [x])


def test_attaching_needs_what_was_observed_for_the_same_method_and_layers(model: Sequence) -> None:
    found = addenda.observe(model, METHOD["inputs"], ["first"], [torch.randn(9, 6)])
    refused = [
        (METHOD["inputs"], ["first"], None, "have to be observed"),
        (METHOD["inputs"], TARGETS, found, "not of 'second'"),
        (LoRA(rank=1, start="corda"), ["first"], found, "other settings"),
    ]
    for method, targets, observed, text in refused:
        with pytest.raises(MethodError, match=text) as caught:
            addenda.attach(model, method, targets, observed=observed)
        assert "observe" in str(caught.value.hint)
        assert type(model.first) is nn.Linear
    assert addenda.attach(model, found.method, ["first"], observed=found).paths == ["first"]


def test_progress_is_told_of_batches_and_of_adapters(model: Sequence) -> None:
    told: list[Progress] = []
    batches = [torch.randn(4, 6) for _ in range(3)]
    found = addenda.observe(model, METHOD["inputs"], TARGETS, batches, on_progress=told.append)
    addenda.attach(model, found.method, TARGETS, observed=found, on_progress=told.append)
    assert [(event.task, event.done, event.total) for event in told] == [
        *[("observe", done, 3) for done in (1, 2, 3)],
        *[("make adapters", done, 2) for done in (1, 2)],
    ]


def test_components_that_come_in_pieces_are_those_of_all_rows(model: Sequence) -> None:
    rows = torch.randn(700, 6).double() * torch.tensor([5.0, 4, 3, 2, 1, 0.5]) + 7
    pieces = [*torch.split(rows, [1, 3, 130, 300, 266])]
    found = addenda.observe(model.double(), LoRA(rank=3, start="eva"), ["first"], pieces).layers["first"]
    centred = rows - rows.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(
        found["components"] @ Vh[:3].t(),
        torch.eye(3).double() * (found["components"] @ Vh[:3].t()).sign(),
        atol=2e-2,
        rtol=0,
    )
    torch.testing.assert_close(found["singular_values"], S[:3], rtol=1e-3, atol=0)
    explained = S[:3].square() / S.square().sum()
    torch.testing.assert_close(found["explained"], explained, rtol=2e-3, atol=0)


def test_ranks_go_where_the_variance_is_and_keep_the_scaling(model: Sequence) -> None:
    x = torch.randn(200, 6) * torch.tensor([9.0, 8, 7, 0, 0, 0])
    for settings in ({}, {"alpha": 3.0}, {"alpha": 3.0, "rank_stabilized": True}):
        method = LoRA(rank=2, start="eva", start_settings={"rho": 2.0}, **settings)
        found = addenda.observe(model, method, TARGETS, [x])
        ranks = {path: found.method.rank_at(path) for path in TARGETS}
        assert sum(ranks.values()) == 4
        assert all(1 <= rank <= 4 for rank in ranks.values())
        shares = sorted(
            (share for path in TARGETS for share in found.layers[path]["explained"].tolist()[1:]),
            reverse=True,
        )
        given = [s for path in TARGETS for s in found.layers[path]["explained"].tolist()[1 : ranks[path]]]
        assert sorted(given, reverse=True) == shares[: len(given)]
        for path in TARGETS:
            assert found.method.scaling_at(path) == pytest.approx(method.scaling_at(path))
        handle = addenda.attach(model, found.method, TARGETS, observed=found)
        assert {path: len(a.A) for path, a in handle.adapters.items()} == ranks
        handle.detach()


def test_a_start_and_its_settings_are_checked_when_the_method_is_made() -> None:
    for settings, text in [
        ({"start": "pisa"}, "no start is called 'pisa'"),
        ({"start": 3}, "start must be a name"),
        ({"start": "pissa", "start_settings": {"rho": 1}}, "has no setting 'rho'; it has: iterations"),
        ({"start": "pissa", "start_settings": {"iterations": -1}}, "iterations must be a whole number >= 0"),
        ({"start": "eva", "start_settings": {"rho": 0.5, "whiten": 1}}, "rho must.*whiten must"),
        ({"start": "corda", "start_settings": {"mode": "x"}}, "mode must be one of"),
        (
            {"start": "lora_ga", "start_settings": {"gamma": 0, "scale": "x", "direction": 1}},
            "gamma.*direction.*scale",
        ),
        ({"start_rows": 0}, "start_rows must be"),
    ]:
        with pytest.raises(ConfigError, match=text):
            LoRA(**settings)
    for settings, text in [
        ({"start": "orthogonal", "rank": 3}, "even rank, got 3"),
        ({"start": "lora_ga", "rank": 4}, "rank 4 exceeds 3"),
    ]:
        with pytest.raises(MethodError, match=text):
            addenda.plan(nn.Sequential(nn.Linear(6, 8)), LoRA(**settings), ["0"])


def test_a_sketch_finds_the_leading_singular_vectors() -> None:
    left, right = (torch.linalg.qr(torch.randn(size, 30).double()).Q for size in (60, 40))
    values = 0.8 ** torch.arange(30).double()
    matrix = left * values @ right.t()
    U, S, Vh = leading_svd(matrix, 6, iterations=6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(S, values[:6], rtol=1e-6, atol=0)
    torch.testing.assert_close(U * S @ Vh, left[:, :6] * values[:6] @ right[:, :6].t(), rtol=0, atol=1e-5)
    again = leading_svd(matrix, 6, iterations=6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], U)
