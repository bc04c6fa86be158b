"""Uni-LoRA: the map from the vector to all factors keeps lengths and uses every entry about equally often."""

from __future__ import annotations

import torch
from torch import nn

import addenda
from addenda.methods.unilora import UniLoRA


def factors(handle: addenda.Handle) -> torch.Tensor:
    terms = [adapter.low_rank_term() for adapter in handle.adapters.values()]
    return torch.cat([factor.flatten() for A, B, _ in terms for factor in (A, B)])


def test_the_map_from_the_vector_to_the_factors_is_an_isometry() -> None:
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 11)).double()
    handle = addenda.attach(model, UniLoRA(rank=3, size=13))
    theta = handle.adapters["0"].common.theta
    columns = []
    for i in range(13):
        with torch.no_grad():
            theta.copy_(torch.eye(13, dtype=torch.float64)[i])
        columns.append(factors(handle))
    P = torch.stack(columns, 1)
    torch.testing.assert_close(P.t() @ P, torch.eye(13, dtype=torch.float64), rtol=0, atol=1e-12)
    assert ((P != 0).sum(1) == 1).all()


def test_no_entry_is_used_twice_more_than_another() -> None:
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 11))
    common = addenda.attach(model, UniLoRA(rank=3, size=13)).adapters["0"].common
    uses = common.indices.bincount(minlength=13)
    assert int(uses.sum()) == 3 * (10 + 7 + 7 + 11)
    assert int(uses.max() - uses.min()) <= 1


def test_layers_read_different_parts_of_the_indices() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    handle = addenda.attach(model, UniLoRA(rank=2, size=5))
    first, second = (adapter.indices()[0] for adapter in handle.adapters.values())
    assert not torch.equal(first, second)
