"""Every kind of layer on which a method may stand, each in a model that takes seconds to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from addenda.core.lowrank import frozen_linear

__all__ = ["LAYERS", "PATHS"]


class FeedForward(nn.Module):
    """A gated feed-forward block, as most language models have."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, inner)
        self.up = nn.Linear(d, inner)
        self.down = nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Int8Linear(nn.Module):
    """A packed linear layer: one int8 code for each weight, one scale for each row."""

    codes: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.randn(out_features, in_features) / in_features**0.5
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.randn(out_features))

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dequantized(self, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.codes * self.scale
        return (weight if rows is None else weight[rows]).to(dtype or self.compute_dtype)

    def linear(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)

    def grad_input(self, g: Tensor) -> Tensor:
        return g @ self.dequantized()

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        return total.addmm_(g, self.dequantized())

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


class Small(nn.Module):
    """The layer under test between a fixed first part and a head, so that gradients must pass through it."""

    def __init__(self, layer: nn.Module, before: nn.Module, width: int) -> None:
        super().__init__()
        self.before = before
        self.layer = layer
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x))
        return self.head(y.flatten(2).mean(-1) if y.dim() > 3 else y)


class Attending(nn.Module):
    """An attention whose keys and values may have other widths than its queries."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(24, 4, batch_first=True, **widths)
        nn.init.normal_(self.layer.in_proj_bias)
        nn.init.normal_(self.layer.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., : self.layer.kdim], x[..., : self.layer.vdim])[0]


class Recurring(nn.Module):
    """A recurrent module, of which the outputs of all steps count."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Mixing(nn.Module):
    """Three experts, two for each row, all of which get rows."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        experts.config._experts_implementation = "eager"
        self.layer = experts
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        chosen = (torch.arange(2 * len(rows), device=x.device) % 3).view(-1, 2)
        gates = rows[:, :2].softmax(-1)
        return self.layer(rows, chosen, gates).view_as(x)


def _linear() -> tuple[nn.Module, Tensor]:
    return Small(nn.Linear(24, 20), nn.Identity(), 20), torch.randn(4, 5, 24)


def _linear_without_bias() -> tuple[nn.Module, Tensor]:
    return Small(nn.Linear(24, 20, bias=False), nn.Identity(), 20), torch.randn(4, 5, 24)


def _packed() -> tuple[nn.Module, Tensor]:
    return Small(Int8Linear(24, 20), nn.Identity(), 20), torch.randn(4, 5, 24)


def _transposed() -> tuple[nn.Module, Tensor]:
    layer = Conv1D(20, 24)
    nn.init.normal_(layer.bias)
    return Small(layer, nn.Identity(), 20), torch.randn(4, 5, 24)


def _conv(layer: Any, *space: int) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, torch.randn(2, layer.in_channels, *space)


def _embedding() -> tuple[nn.Module, Tensor]:
    return Small(nn.Embedding(30, 24), nn.Identity(), 24), torch.randint(30, (4, 7))


def _norm(layer: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, torch.randn(*shape)


def _block() -> tuple[nn.Module, Tensor]:
    return Small(FeedForward(24, 40), nn.Identity(), 24), torch.randn(4, 5, 24)


def _gated_experts() -> tuple[nn.Module, Tensor]:
    config = MixtralConfig(hidden_size=24, intermediate_size=10, num_local_experts=3)
    return Mixing(MixtralExperts(config)), torch.randn(4, 5, 24)


def _transposed_experts() -> tuple[nn.Module, Tensor]:
    config = GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=3)
    return Mixing(GptOssExperts(config)), torch.randn(4, 5, 24)


def _transformer_block() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
    return Small(layer, nn.Identity(), 24), torch.randn(4, 5, 24)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": _linear,
    "linear-no-bias": _linear_without_bias,
    "packed-linear": _packed,
    "conv1d-transposed": _transposed,
    "conv1d": lambda: _conv(nn.Conv1d(16, 20, 3, padding=1), 9),
    "conv2d": lambda: _conv(nn.Conv2d(16, 20, 3, stride=2, padding=1), 8, 9),
    "conv2d-grouped": lambda: _conv(nn.Conv2d(16, 32, 3, groups=4, dilation=2, bias=False), 8, 9),
    "conv2d-grouped-square": lambda: _conv(nn.Conv2d(16, 32, 2, groups=4), 8, 9),
    "conv2d-reflect": lambda: _conv(nn.Conv2d(16, 20, 3, padding="same", padding_mode="reflect"), 8, 9),
    "conv3d": lambda: _conv(nn.Conv3d(16, 20, (1, 2, 3)), 4, 5, 6),
    "transposed-conv1d": lambda: _conv(nn.ConvTranspose1d(16, 20, 3, stride=2, output_padding=1), 9),
    "transposed-conv2d-grouped": lambda: _conv(
        nn.ConvTranspose2d(16, 32, (2, 3), groups=4, dilation=2), 5, 6
    ),
    "embedding": _embedding,
    "embedding-padded": lambda: (
        Small(nn.Embedding(30, 24, padding_idx=3), nn.Identity(), 24),
        torch.randint(30, (4, 7)),
    ),
    "attention": lambda: (Attending(), torch.randn(4, 5, 24)),
    "attention-output": lambda: (Attending(), torch.randn(4, 5, 24)),
    "attention-separate": lambda: (Attending(kdim=20, vdim=16), torch.randn(4, 5, 24)),
    "lstm": lambda: (Recurring(nn.LSTM(24, 5, batch_first=True)), torch.randn(4, 5, 24)),
    "gru": lambda: (Recurring(nn.GRU(7, 24, num_layers=2, bidirectional=True)), torch.randn(4, 5, 7)),
    "expert": _gated_experts,
    "expert-transposed": _transposed_experts,
    "layer-norm": lambda: _norm(nn.LayerNorm(24), 4, 5, 24),
    "rms-norm": lambda: _norm(LlamaRMSNorm(24), 4, 5, 24),
    "group-norm": lambda: _norm(nn.GroupNorm(4, 16), 2, 16, 8, 9),
    "batch-norm": lambda: _norm(nn.BatchNorm2d(16).eval(), 2, 16, 8, 9),
    "block": _block,
    "transformer-block": _transformer_block,
}
"""Every layer on which every method is tried; the layer is called ``layer``."""

PATHS = {
    "attention": "layer.v_proj",
    "attention-output": "layer.out_proj",
    "attention-separate": "layer.q_proj",
    "lstm": "layer.weight_ih_l0",
    "gru": "layer.weight_hh_l1_reverse",
    "expert": "layer.1.gate_up_proj",
    "expert-transposed": "layer.2.down_proj",
}
"""Where the layer under test is not ``layer`` itself, but a part of it."""
