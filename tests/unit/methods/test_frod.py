"""FRoD: what is frozen gives the weight back, and what is trained gives an update of full rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.methods.frod import FRoD, off_diagonal


class Block(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_in, d_out)


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 9), (9, 6), (7, 7)])
def test_the_frozen_parts_give_the_weight_back(d_in: int, d_out: int) -> None:
    model = nn.Sequential(*[Block(d_in, d_out).double() for _ in range(3)])
    handle = addenda.attach(model, FRoD())
    bases = {id(adapter.basis) for adapter in handle.adapters.values()}
    assert len(bases) == 1
    for path, adapter in handle.adapters.items():
        weight = model.get_submodule(path).weight
        torch.testing.assert_close(
            adapter.U @ torch.diag(adapter.start) @ adapter.basis.V.t(), weight.detach(), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(adapter.U.norm(dim=0), torch.ones(d_in).double(), rtol=0, atol=1e-6)


def test_the_update_has_full_rank_and_the_stated_parameters() -> None:
    handle = addenda.attach(nn.Sequential(*[Block(8, 10).double() for _ in range(2)]), FRoD(share=0.25))
    assert handle.trainable_parameters == 2 * (8 + 16)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    update, _ = handle.adapters["0.up"].fold(torch.zeros(10, 8, dtype=torch.float64), None)
    assert torch.linalg.matrix_rank(update) == 8


def test_the_places_are_off_the_diagonal_and_none_comes_twice() -> None:
    rows, columns = off_diagonal(5, 20, torch.Generator().manual_seed(1))
    assert not (rows == columns).any()
    assert len({(int(i), int(j)) for i, j in zip(rows, columns, strict=True)}) == 20
