"""A method of one's own in one file: gate each output channel with a learned sigmoid.

Registered, it has everything the built-in ones have: planning, probing, merging, saving and loading.

Run: python examples/02_own_method.py
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import addenda
from addenda.core import Adapter, Base, Method
from addenda.core.registry import register


@register("output-gate")
@dataclass(frozen=True)
class OutputGate(Method):
    """y = 2 sigmoid(g) * base(x), with g: (channels_out,) starting at zero, so the start is the base."""

    mergeable: ClassVar[bool] = True

    def build(self, base: Base) -> Adapter:
        return OutputGateAdapter(base.parameter(base.channels_out))


class OutputGateAdapter(Adapter):
    def __init__(self, gate: nn.Parameter) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor, base: Base) -> Tensor:
        factor = 2 * torch.sigmoid(self.gate).to(base.dtype)
        return base.outputs_back(base.outputs_last(base(x)) * factor)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 2 * torch.sigmoid(self.gate).to(weight.dtype)
        return weight * factor[:, None], None if bias is None else bias * factor


torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3)), torch.randn(5, 12)
handle = addenda.attach(model, OutputGate(), targets="all-linear", probe=x)
print(handle)

model(x).square().sum().backward()
torch.optim.SGD(handle.parameters(), lr=0.5).step()
trained = model(x)

with tempfile.TemporaryDirectory() as folder:
    addenda.save(model, f"{folder}/gate")
    handle.detach()
    addenda.load(model, f"{folder}/gate")
print("saved and loaded, it answers the same:", torch.equal(model(x), trained))
