"""AdapterFusion against its formula, and the life of a mixture beside what it mixes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda
import addenda.errors
from addenda.methods.adapter_fusion import AdapterFusion

MIX = AdapterFusion(of=("law", "style"))


class Two(nn.Module):
    """Two linear layers of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def stirred(handle: addenda.Handle) -> addenda.Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return handle


@pytest.fixture
def model() -> nn.Module:
    """Two layers that carry a bottleneck and a low-rank adapter."""
    made = Two().double()
    stirred(addenda.attach(made, addenda.Bottleneck(size=3), ["first", "second"], name="law"))
    stirred(addenda.attach(made, addenda.LoRA(rank=2), ["first", "second"], name="style"))
    return made


def test_forward_is_attention_over_what_each_adapter_changes(model: nn.Module) -> None:
    x = torch.randn(4, 3, 6).double()
    alone = {}
    for name in ("law", "style"):
        addenda.activate(model, name)
        alone[name] = model.first(x)
    addenda.activate(model, None)
    h = model.first(x)
    handle = stirred(addenda.attach(model, AdapterFusion(of=("law", "style"), size=4), name="mix"))
    own = handle.adapters["first"]
    found = model.first(x)
    for row in range(4):
        for token in range(3):
            base = h[row, token]
            changes = [alone[name][row, token] - base for name in ("law", "style")]
            logits = torch.stack([(own.Q @ base) @ (own.K @ change) for change in changes])
            shares = logits.exp() / logits.exp().sum()
            values = [own.V @ change for change in changes]
            torch.testing.assert_close(
                found[row, token], base + shares[0] * values[0] + shares[1] * values[1]
            )


def test_the_penalty_is_the_distance_of_the_values_from_the_identity(model: nn.Module) -> None:
    handle = stirred(
        addenda.attach(model, AdapterFusion(of=("law", "style"), identity_penalty=0.5), name="mix")
    )
    away = [(a.V - torch.eye(len(a.V)).double()).square().sum() for a in handle.adapters.values()]
    torch.testing.assert_close(handle.penalty(), 0.5 * (away[0] + away[1]))
    none = addenda.attach(model, AdapterFusion(of=("law", "style"), identity_penalty=0.0), name="none")
    assert none.penalty() is None


def test_what_is_mixed_rests_until_the_last_mixture_is_gone(model: nn.Module) -> None:
    x = torch.randn(4, 6).double()
    law, style = (addenda.handles(model)[name] for name in ("law", "style"))
    style.disable()
    before = model(x)
    mix = addenda.attach(model, MIX, name="mix")
    more = addenda.attach(model, MIX, name="more")
    assert not law.active
    assert not any(p.requires_grad for handle in (law, style) for p in handle.parameters())
    mix.detach()
    assert not any(p.requires_grad for handle in (law, style) for p in handle.parameters())
    more.detach()
    assert all(p.requires_grad for handle in (law, style) for p in handle.parameters())
    assert law.active
    assert not style.active
    assert torch.equal(model(x), before)


def test_what_is_mixed_cannot_be_taken_away_merged_or_run_twice(model: nn.Module) -> None:
    law = addenda.handles(model)["law"]
    mix = addenda.attach(model, MIX, name="mix")
    for refused in (law.detach, law.merge):
        with pytest.raises(addenda.errors.MethodError, match="'mix' mixes it"):
            refused()
    for refused in (law.enable, lambda: addenda.activate(model, ["law", "mix"])):
        with pytest.raises(addenda.errors.MethodError, match="run twice"):
            refused()
    addenda.activate(model, "law")
    with pytest.raises(addenda.errors.MethodError, match="run twice"):
        mix.enable()
    with pytest.raises(addenda.errors.MethodError, match="cannot be merged"):
        mix.merge()


def test_the_plan_refuses_what_cannot_be_mixed_and_names_the_layers(model: nn.Module) -> None:
    with pytest.raises(addenda.errors.NotFoundError, match="no adapter 'lax', 'stile' to mix"):
        addenda.plan(model, AdapterFusion(of=("lax", "stile")))
    with pytest.raises(addenda.errors.MethodError, match="names no adapters to mix"):
        addenda.plan(model, AdapterFusion(), ["first"])
    addenda.attach(model, MIX, name="mix")
    with pytest.raises(addenda.errors.MethodError, match="'mix' is a mixture itself"):
        addenda.plan(model, AdapterFusion(of=("law", "mix")))
    addenda.attach(model, addenda.LoRA(rank=2), ["second"], name="some")
    with pytest.raises(addenda.errors.MethodError, match="no adapter 'some' to mix at 'first'"):
        addenda.plan(model, AdapterFusion(of=("law", "some")))
    assert [row.path for row in addenda.plan(model, AdapterFusion(of=("law", "some")), ["second"]).rows] == [
        "second"
    ]
    addenda.activate(model, [])
    some = addenda.handles(model)["some"]
    some.enable()
    some.merge()
    with pytest.raises(addenda.errors.MethodError, match="'some' is merged"):
        addenda.plan(model, AdapterFusion(of=("law", "some")), ["second"])
    for settings, problem in (({"of": ("law",)}, "one adapter"), ({"of": ("law", "law")}, "twice")):
        with pytest.raises(addenda.errors.ConfigError, match=problem):
            AdapterFusion(**settings)


def test_a_failed_attach_leaves_the_mixed_adapters_as_they_were(model: nn.Module) -> None:
    before = addenda.core.active_composition(model)
    with pytest.raises(addenda.errors.TargetError):
        addenda.attach(model, MIX, name="mix", probe=lambda made: made.first(torch.randn(2, 6).double()))
    assert addenda.core.active_composition(model) == before
    assert all(p.requires_grad for handle in addenda.handles(model).values() for p in handle.parameters())


def test_it_is_loaded_over_the_adapters_that_it_was_trained_over_and_no_others(
    model: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(4, 6).double()
    mix = stirred(addenda.attach(model, MIX, name="mix"))
    expected = model(x)
    addenda.save(model, tmp_path / "mix", name="mix")
    mix.detach()
    addenda.load(model, tmp_path / "mix").detach()
    style = addenda.handles(model)["style"]
    with torch.no_grad():
        next(style.parameters()).mul_(1.001)
    with pytest.raises(addenda.errors.CheckpointError, match="'style' is another adapter"):
        addenda.load(model, tmp_path / "mix")
    style.detach()
    with pytest.raises(addenda.errors.CheckpointError, match="'style' is not on the model") as caught:
        addenda.load(model, tmp_path / "mix")
    assert caught.value.hint
    manifest = json.loads((tmp_path / "mix" / "adapter.json").read_text())
    (tmp_path / "mix" / "adapter.json").write_text(json.dumps({**manifest, "mixes": ["law"]}))
    with pytest.raises(addenda.errors.CheckpointError, match="misstates mixes"):
        addenda.load(model, tmp_path / "mix")
    assert expected.shape == (4, 5)


def test_all_adapters_come_back_with_the_mixture_that_runs_them(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(4, 6).double()
    stirred(addenda.attach(model, MIX, name="mix"))
    expected = model(x)
    addenda.save_all(model, tmp_path / "all")
    for handle in reversed(addenda.handles(model).values()):
        handle.detach()
    loaded = addenda.load_all(model, tmp_path / "all", trainable=True)
    assert torch.equal(model(x), expected)
    assert all(p.requires_grad for p in loaded["mix"].parameters())
    assert not any(p.requires_grad for p in loaded["law"].parameters())


def test_fusion_learns_which_adapter_a_token_needs() -> None:
    """Where each of two adapters is right for one half of the inputs, only a choice by token fits both."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    for name, rows in (("law", slice(0, 3)), ("style", slice(3, 6))):
        handle = addenda.attach(model, addenda.LoRA(rank=6), ["0"], name=name)
        with torch.no_grad():
            handle.adapters["0"].A.copy_(torch.eye(6))
            handle.adapters["0"].B[rows].copy_(torch.randn(3, 6))
    x = torch.randn(256, 6)
    first = (x[:, :1] > 0).float()
    outputs = {}
    for name in ("law", "style"):
        addenda.activate(model, name)
        outputs[name] = model(x).detach()
    wanted = first * outputs["law"] + (1 - first) * outputs["style"]
    handle = addenda.attach(model, AdapterFusion(of=("law", "style")), name="mix")
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
