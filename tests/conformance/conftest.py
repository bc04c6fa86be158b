"""Which cases the everyday suite tries; the slow one has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from addenda.core import Method

HERE = Path(__file__).parent
EVERY_DAY = ("linear", "packed-linear", "conv1d-transposed", "conv2d", "embedding")
"""Layers on which every method is tried with its first settings; on others three are, on a linear one all settings."""
THREE = ("lora", "ia3", "bottleneck")
MODELS = ("gpt2", "bert")
"""Models on which a method that changes the sequence is tried with its first settings; on llama with all."""
COMPILED = ("prompt-tuning", "prefix-tuning", "llama-adapter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the others slow."""
    for item in items:
        here = item.path.parent == HERE and hasattr(item, "callspec")
        if here and "method" in item.callspec.params and not everyday(item.name, item.callspec.params):
            item.add_marker(pytest.mark.slow)


def everyday(test: str, chosen: dict[str, object]) -> bool:
    method = chosen["method"]
    assert isinstance(method, Method)
    first = method == type(method).from_settings(type(method).variants[0])
    if chosen.get("dtype", torch.bfloat16) != torch.bfloat16:
        return first and chosen.get("layer", chosen.get("kind")) in ("linear", "llama")
    if "kind" in chosen:
        if "test_compiled" in test:
            return first and method.name in COMPILED
        return chosen["kind"] == "llama" or (first and chosen["kind"] in MODELS)
    layer = chosen.get("layer", "linear")
    return layer == "linear" or (first and (layer in EVERY_DAY or method.name in THREE))
