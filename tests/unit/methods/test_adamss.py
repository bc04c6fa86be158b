"""AdaMSS: the decomposition and the groups it starts from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.methods.adamss import AdaMSS, clustered, main_directions


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
def test_main_directions_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    left, right = (torch.linalg.qr(torch.randn(size, 30)[:, :30])[0] for size in shape)
    weight = left @ torch.diag(0.2 ** torch.arange(30.0)) @ right.t()
    U, V = main_directions(weight, 6, seed=1)
    whole_U, _, whole_V = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close((U.t() @ whole_U[:, :6]).abs(), torch.eye(6), rtol=0, atol=1e-2)
    torch.testing.assert_close((V @ whole_V[:6].t()).abs(), torch.eye(6), rtol=0, atol=1e-2)


def test_clusters_far_apart_are_found() -> None:
    centres = torch.randn(2, 5) * 100
    wanted = torch.randint(2, (60,))
    found = clustered(centres[wanted] + torch.randn(60, 5), 2)
    assert torch.equal(found, wanted) or torch.equal(found, 1 - wanted)


def test_clusters_are_those_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    for count in (1, 2, 5, 9, 40):
        points = torch.randn(40, 7)
        theirs = cluster.KMeans(count, init="random", n_init=1, max_iter=10, random_state=123456789)
        assert clustered(points, count).tolist() == theirs.fit_predict(points.numpy()).tolist()


def test_each_group_is_changed_within_its_own_directions_alone() -> None:
    model = nn.Sequential(nn.Linear(24, 20)).double()
    adapter = addenda.attach(model, AdaMSS(basis_rank=10, subspaces=3, rank=2), targets=["0"]).adapters["0"]
    with torch.no_grad():
        adapter.B.copy_(torch.randn_like(adapter.B))
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    folded, shifted = adapter.fold(weight, bias)
    update = torch.cat([folded - weight, (shifted - bias)[:, None]], 1).detach()
    for row in range(20):
        directions = adapter.A[int(adapter.groups[row])].detach() @ adapter.V
        torch.testing.assert_close(update[row], adapter.B[row].detach() @ directions)
