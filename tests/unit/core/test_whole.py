"""Layers trained whole beside any method: heads, embeddings, norms, containers; the base stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core import registry
from addenda.core.contract import Method
from addenda.core.whole import WholeAdapter
from addenda.methods.full import Full
from addenda.methods.vera import VeRA


class Net(nn.Module):
    """An embedding, two layers of some method, a norm, and a head of two layers."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20))
        if tied:
            self.head[2].weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.second(torch.tanh(self.first(self.embed(ids))))))


TARGETS = ["first", "second"]
WHOLE = ("embed", "norm", "head")
PATHS = ["embed", "first", "second", "norm", "head.0", "head.2"]
IDS = torch.arange(20).reshape(4, 5)


def stir(handle: addenda.Handle) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("tied", [False, True])
def test_every_number_is_trained_and_the_base_stays(tied: bool) -> None:
    model = Net(tied=tied)
    before, weights = model(IDS), {n: p.detach().clone() for n, p in model.named_parameters()}
    method = addenda.LoRA(rank=2, whole=WHOLE)
    planned = addenda.plan(model, method, TARGETS)
    handle = addenda.attach(model, method, TARGETS, probe=IDS)
    assert handle.paths == [row.path for row in planned.rows] == PATHS
    whole = sum(
        p.numel() for name in WHOLE for p in model.get_submodule(name).parameters() if p.requires_grad
    )
    assert handle.trainable_parameters == planned.parameters == whole + 2 * 2 * (12 + 16)
    assert [path for path, a in handle.adapters.items() if isinstance(a, WholeAdapter)] == [
        path for path in PATHS if path not in TARGETS
    ]
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-6)
    model(IDS).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in handle.named_parameters() if ".A" not in n
    )
    stir(handle)
    handle.disable()
    assert torch.equal(model(IDS), before)
    handle.detach()
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())


def test_a_tied_weight_changes_for_the_named_layer_alone() -> None:
    model = Net(tied=True)
    embedded = model.embed(IDS)
    handle = addenda.attach(model, addenda.LoRA(rank=2, whole=("head.2",)), TARGETS)
    stir(handle)
    assert torch.equal(model.embed(IDS), embedded)
    with pytest.raises(addenda.MethodError, match="shares its weight"):
        handle.merge()


def test_it_is_saved_loaded_merged_and_copied(tmp_path: object) -> None:
    model = Net()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = addenda.attach(model, addenda.LoRA(rank=2, whole=WHOLE), TARGETS)
    stir(handle)
    expected = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    addenda.save(model, f"{tmp_path}/adapter")
    handle.merge()
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    handle.detach()
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    loaded = addenda.load(model, f"{tmp_path}/adapter")
    assert torch.equal(model(IDS), expected)
    assert loaded.paths == PATHS


def test_full_training_is_what_training_the_weight_itself_is() -> None:
    torch.manual_seed(3)
    ours, theirs = Net().double(), Net().double()
    theirs.load_state_dict(ours.state_dict())
    theirs.requires_grad_(False)
    handle = addenda.attach(ours, Full(), ["embed", "norm", "head.2", "first"])
    trained = [theirs.embed, theirs.norm, theirs.head[2], theirs.first]
    parameters = [p.requires_grad_() for module in trained for p in module.parameters()]
    optimizers = [torch.optim.Adam(handle.parameters(), 1e-2), torch.optim.Adam(parameters, 1e-2)]
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(IDS).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", registry.names())
def test_every_method_takes_layers_along(name: str) -> None:
    cls = registry.get(name)
    settings = {**cls.variants[0], "whole": ("head",)}
    method = cls.from_settings(settings)
    targets = next((t for t in (["second"], ["norm"], ["embed"]) if _stands(method, t)), None)
    if targets is None:
        pytest.skip("it stands on none of these layers")
    model = Net()
    handle = addenda.attach(model, method, targets)
    assert handle.paths == [path for path in PATHS if path in (*targets, "head.0", "head.2")]
    assert handle.own().paths == targets
    assert method.settings()["whole"] == ["head"]
    assert handle.rate_of("head.0.weight") == 1.0
    handle.penalty()
    model(IDS).square().sum().backward()
    handle.after_update(step=1, of_steps=2)


def _stands(method: Method, targets: list[str]) -> bool:
    try:
        addenda.plan(Net(), method, targets)
    except addenda.AddendaError:
        return False
    return True


def test_the_first_layer_may_be_whole_where_the_others_share_tensors() -> None:
    model, method = Net(), VeRA(rank=3, whole=("embed",))
    handle = addenda.attach(model, method, TARGETS)
    assert handle.trainable_parameters == addenda.plan(Net(), method, TARGETS).parameters
    assert handle.adapters["embed"].common is None
    assert handle.adapters["first"].common is handle.adapters["second"].common is not None


def test_a_target_that_is_trained_whole_gets_that_alone() -> None:
    handle = addenda.attach(Net(), addenda.LoRA(rank=2, whole=("second",)), "all-linear")
    assert isinstance(handle.adapters["second"], WholeAdapter)
    assert not isinstance(handle.adapters["first"], WholeAdapter)


class Odd(nn.Module):
    """A head with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


@pytest.mark.parametrize(
    ("whole", "text"),
    [
        (("nowhere",), "whole names no layer by 'nowhere'"),
        (("1",), "whole names '1.scale', which belongs to no layer"),
        (("ear",), "whole names no layer by 'ear'"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(whole: tuple[str, ...], text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Odd())
    with pytest.raises(addenda.MethodError, match=text):
        addenda.plan(model, addenda.LoRA(rank=2, whole=whole), "0")


@pytest.mark.parametrize(
    "module",
    [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LSTM(8, 8), nn.GRU(8, 8, bias=False)],
)
def test_modules_whose_weights_are_parts_of_parameters_are_trained_whole(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module)
    planned = addenda.plan(model, addenda.LoRA(rank=2, whole=("1",)), "0")
    assert planned.parameters == sum(p.numel() for p in module.parameters()) + 2 * (8 + 8)


def test_a_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(addenda.ConfigError, match="whole must be a list"):
        addenda.LoRA(whole="head")
