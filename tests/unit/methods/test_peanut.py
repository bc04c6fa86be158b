"""PEANuT: the update is what the network makes of each column, and has the stated rank."""

from __future__ import annotations

import torch
from torch import nn

import addenda
from addenda.methods.peanut import PEANuT


def test_the_network_reads_one_column_at_a_time() -> None:
    model = nn.Sequential(nn.Linear(7, 9)).double()
    handle = addenda.attach(model, PEANuT(rank=3, depth=2, activation="tanh", scaling=0.7), targets=["0"])
    adapter = handle.adapters["0"]
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    weight = model[0].weight.detach()
    update = adapter.fold(weight, None)[0] - weight
    for column in range(7):
        first = torch.tanh(adapter.A @ weight[:, column])
        second = torch.tanh(adapter.encoders[0] @ first)
        third = torch.tanh(adapter.encoders[1] @ second)
        fourth = torch.tanh(adapter.decoders[0] @ third) + second
        fifth = torch.tanh(adapter.decoders[1] @ fourth) + first
        torch.testing.assert_close(update[:, column], 0.7 * adapter.B @ fifth, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(update) == 3
