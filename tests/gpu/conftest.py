"""What runs on a GPU must give what the CPU gives; every test here is skipped where no GPU answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.core import Handle

VOCAB = 512
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "gemma2": lambda **sizes: transformers.Gemma2Config(**sizes, sliding_window=40, query_pre_attn_scalar=32),
    "gemma3": lambda **sizes: transformers.Gemma3TextConfig(**sizes, sliding_window=40),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder; what PyTorch's compiler warns of is its own affair."""
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker("gpu")
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device() -> torch.device:
    """Where the tests of this folder run."""
    return torch.device("cuda")


def make(family: str, **sizes: Any) -> tuple[nn.Module, Handle]:
    """A small model with random weights and a LoRA adapter that changes something."""
    config = FAMILIES[family](**{**SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    handle = addenda.attach(model, addenda.LoRA(rank=8), "all-linear")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.05)
    return model, handle


@pytest.fixture
def made() -> Callable[..., tuple[nn.Module, Handle]]:
    """Make a model with an adapter: ``made(family, **sizes)``."""
    return make
