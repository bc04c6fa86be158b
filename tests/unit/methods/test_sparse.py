"""SHiRA and Super-tuning: which numbers are trained, that no other changes, and what the answer is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.methods.shira import SHiRA
from addenda.methods.supertuning import SuperTuning

METHODS = {
    "random": (SHiRA(rank=2), 2 * (14 + 11)),
    "magnitude": (SHiRA(rank=1, mask="magnitude"), 14 + 11),
    "super": (SuperTuning(sparsity=0.75), int(14 * 11 * 0.25)),
    "bottom": (SuperTuning(sparsity=0.9, smallest=True), int(14 * 11 * (1 - 0.9))),
}


@pytest.mark.parametrize("name", METHODS)
def test_as_many_numbers_change_as_are_trained_and_no_other(name: str) -> None:
    method, count = METHODS[name]
    model = nn.Sequential(nn.Linear(14, 11))
    before = model[0].weight.detach().clone()
    handle = addenda.attach(model, method, "0", seed=int(torch.randint(1000, ())))
    assert handle.trainable_parameters == count
    nn.init.normal_(next(handle.parameters()))
    handle.merge()
    changed = model[0].weight != before
    assert int(changed.sum()) == count
    sizes = before.abs()
    if name in ("magnitude", "super"):
        assert sizes[changed].min() >= sizes[~changed].max()
    if name == "bottom":
        assert sizes[changed].max() <= sizes[~changed].min()


def test_random_places_depend_on_the_seed_and_the_layer() -> None:
    model = nn.Sequential(nn.Linear(14, 11), nn.Linear(14, 11))
    places = [
        handle.tensors()[f"{layer}.places"]
        for seed in (0, 1)
        for handle in [addenda.attach(model, SHiRA(rank=1), ["0", "1"], name=f"s{seed}", seed=seed)]
        for layer in "01"
    ]
    assert len({tuple(each.tolist()) for each in places}) == 4
    assert all(torch.equal(each, each.unique()) for each in places)


def test_supra_adds_a_low_rank_update() -> None:
    model, x = nn.Sequential(nn.Linear(14, 11)).double(), torch.randn(5, 14).double()
    handle = addenda.attach(model, SuperTuning(sparsity=0.5, rank=3, alpha=6.0), "0")
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    adapter, weight = handle.adapters["0"], model[0].weight.detach().clone()
    flat = weight.view(-1)
    for place, value in zip(adapter.sparse.places.tolist(), adapter.sparse.values.tolist(), strict=True):
        flat[place] += value
    expected = x @ (weight + 2.0 * adapter.B @ adapter.A).t() + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (SHiRA(rank=9), "225 of 154 numbers cannot be trained"),
        (SuperTuning(sparsity=0.999), "0 of 154 numbers"),
        (SuperTuning(sparsity=0.5, rank=12), "rank 12 exceeds"),
    ],
)
def test_more_or_fewer_numbers_than_there_are_are_refused(method: addenda.Method, text: str) -> None:
    with pytest.raises(addenda.MethodError, match=text):
        addenda.plan(nn.Sequential(nn.Linear(14, 11)), method, "0")


def test_settings_of_a_missing_low_rank_part_are_refused() -> None:
    with pytest.raises(addenda.ConfigError, match="ask for a rank"):
        SuperTuning(alpha=3.0)
