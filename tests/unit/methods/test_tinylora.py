"""TinyLoRA: what is frozen are the weight's main directions, and which layers share a vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import addenda
from addenda.export.peft import import_peft, write_peft
from addenda.methods.tinylora import TinyLoRA


def test_the_frozen_factors_are_the_best_approximation_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(9, 7))
    adapter = addenda.attach(model, TinyLoRA(rank=3, size=2), targets=["0"]).adapters["0"]
    weight = model[0].weight.detach().double()
    rest = torch.linalg.matrix_norm(weight - adapter.B.double() @ adapter.A.double(), 2)
    torch.testing.assert_close(rest, torch.linalg.svdvals(weight)[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, [0, 1, 2, 3, 4]), (0.6, [0, 0, 1, 1, 1]), (1.0, [0] * 5)]
)
def test_neighbours_share_a_vector(tying: float, groups: list[int]) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    handle = addenda.attach(model, TinyLoRA(size=3, tying=tying))
    assert [adapter.group for adapter in handle.adapters.values()] == groups
    assert handle.trainable_parameters == 3 * len(set(groups))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.head = nn.Embedding(30, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x))


def test_an_embedding_goes_to_peft_and_back(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = Words(), torch.randint(30, (4, 6))
    handle = addenda.attach(model, TinyLoRA(rank=3, size=6), targets=["words", "head"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Words(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    again = Words()
    import_peft(again, tmp_path)
    assert torch.equal(again(x), model(x))
