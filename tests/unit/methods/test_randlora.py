"""RandLoRA: the rank of its update, the sum it stands for, and how sparse its bases are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import addenda
from addenda.methods.randlora import RandLoRA


def stirred(model: nn.Module, method: RandLoRA) -> addenda.Handle:
    handle = addenda.attach(model, method)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return handle


@pytest.mark.parametrize("sides", [(20, 12), (12, 20), (16, 16)])
def test_the_update_has_full_rank(sides: tuple[int, int]) -> None:
    handle = stirred(nn.Sequential(nn.Linear(*sides)).double(), RandLoRA(rank=5))
    weight = torch.zeros(sides[1], sides[0], dtype=torch.float64)
    update, _ = handle.adapters["0"].fold(weight, None)
    assert torch.linalg.matrix_rank(update) == min(sides)


def test_the_update_is_a_sum_over_pairs_of_a_row_and_a_column() -> None:
    handle = stirred(nn.Sequential(nn.Linear(6, 9)).double(), RandLoRA(rank=4, alpha=6.0))
    adapter = handle.adapters["0"]
    A, B = adapter.common.A[:, 0], adapter.common.B
    rows = [adapter.rows[k, j] * A[k] * adapter.columns[j] for k in range(4) for j in range(2)]
    columns = [B[:, j, k] for j in range(2) for k in range(4)]
    expected = 1.5 * sum(torch.outer(c, r) for c, r in zip(columns, rows, strict=True))
    update, _ = adapter.fold(torch.zeros(9, 6, dtype=torch.float64), None)
    torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("bases", "zeros"), [("sparse", 2 / 3), ("very-sparse", 1 - 2 / (2 * math.sqrt(256)))]
)
def test_sparse_bases_have_one_size_and_the_stated_share_of_zeros(bases: str, zeros: float) -> None:
    model = nn.Sequential(nn.Linear(256, 300))
    common = addenda.attach(model, RandLoRA(rank=32, bases=bases), targets=["0"]).adapters["0"].common
    for base in (common.A, common.B):
        assert len(base.abs().unique()) == 2
        assert abs(float(base.std()) - 1) < 1e-3
    assert abs(float((common.B == 0).float().mean()) - zeros) < 0.01
