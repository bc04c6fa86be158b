"""What the properties are tried with: numbers of their own for each test, adapters of a trained size, snapshots."""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch
from torch import Tensor, nn

from addenda.core.handle import Handle

__all__ = ["same", "seeded", "snapshot", "stirred"]


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> int:
    """Seed Python's and PyTorch's generators from the test's own name, and ADDENDA_TEST_SEED; returns the seed."""
    seed = zlib.crc32(f"{os.environ.get('ADDENDA_TEST_SEED', '')}/{request.node.nodeid}".encode())
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


def stirred(handle: Handle) -> Handle:
    """Give the adapter values of a trained size, so that nothing is zero."""
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return handle


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all that the model's state holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two snapshots are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
