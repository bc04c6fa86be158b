"""VB-LoRA: what a piece is made of, and which length fits every layer."""

from __future__ import annotations

import torch
from torch import nn

import addenda
from addenda.methods.vblora import VBLoRA


def test_each_piece_is_the_softmax_mixture_of_the_vectors_with_the_largest_logits() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    handle = addenda.attach(model, VBLoRA(rank=2, vectors=7, length=4, top=3), targets=["0"])
    adapter = handle.adapters["0"]
    bank = adapter.common.bank.double()
    A, B, scaling = adapter.low_rank_term()

    def piece(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.detach()
        best = sorted(range(7), key=lambda i: -float(logits[i]))[:3]
        total = sum(torch.exp(logits[i].double()) for i in best)
        return sum(torch.exp(logits[i].double()) / total * bank[i] for i in best)

    for row in range(2):
        for part in range(3):
            expected = piece(adapter.logits_A[row, part])
            torch.testing.assert_close(
                A[row, 4 * part : 4 * part + 4].double(), expected, rtol=1e-5, atol=1e-7
            )
        for part in range(2):
            expected = piece(adapter.logits_B[part, row])
            torch.testing.assert_close(
                B[4 * part : 4 * part + 4, row].double(), expected, rtol=1e-5, atol=1e-7
            )
    assert scaling == 1.0


def test_the_length_divides_every_side_and_is_the_largest_that_does() -> None:
    model = nn.Sequential(nn.Linear(768, 1024), nn.Linear(1024, 512))
    handle = addenda.attach(model, VBLoRA(rank=1, vectors=4))
    assert handle.adapters["0"].common.bank.shape == (4, 256)
    small = nn.Sequential(nn.Linear(18, 12), nn.Linear(12, 30))
    assert addenda.attach(small, VBLoRA(rank=1, vectors=4)).adapters["0"].common.bank.shape == (4, 6)


def test_the_logits_learn_ten_times_as_fast_as_the_bank() -> None:
    handle = addenda.attach(nn.Sequential(nn.Linear(8, 8)), VBLoRA(rank=1, vectors=4))
    rates = {name: handle.rate_of(name) for name, _ in handle.named_parameters()}
    assert rates == {"*.bank": 1.0, "0.logits_A": 10.0, "0.logits_B": 10.0}
