"""What the properties are tried with: numbers of their own for each test, adapters of a trained size, snapshots."""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from addenda.conformance.layers import FeedForward
from addenda.core import registry
from addenda.core.attaching import attach
from addenda.core.contract import Method
from addenda.core.handle import Handle

__all__ = ["fitting", "same", "seeded", "snapshot", "stirred", "with_mixed"]


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> int:
    """Seed Python's and PyTorch's generators from the test's own name, and ADDENDA_TEST_SEED; returns the seed."""
    seed = zlib.crc32(f"{os.environ.get('ADDENDA_TEST_SEED', '')}/{request.node.nodeid}".encode())
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


def stirred(handle: Handle, by: float = 0.3) -> Handle:
    """Give the adapter values of a trained size, so that nothing is zero."""
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return handle


def with_mixed(model: nn.Module, method: Method, path: str) -> nn.Module:
    """Attach the adapters that a method mixes, if any, to the same layers; they do not run by themselves."""
    block = isinstance(getattr(model, path, None), FeedForward)
    kind, settings = ("bottleneck", {"size": 2, "placement": "parallel"}) if block else ("lora", {"rank": 2})
    for name in method.mixes():
        made = registry.get(kind).from_settings(settings)
        stirred(attach(model, made, path, name=name, seed=len(name)), by=0.15).disable()
    return model


def fitting(method: Method, width: int) -> Method:
    """Return the method for a model that ends in that many features, where it has to be told."""
    return replace(method, hidden_size=width) if hasattr(method, "hidden_size") else method  # type: ignore[call-arg]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all that the model's state holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two snapshots are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
