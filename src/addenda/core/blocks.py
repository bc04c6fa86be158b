"""Whole transformer blocks as a method sees them: features in, features out, and no weight of their own."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from addenda.core.norms import is_norm
from addenda.core.prompts import Prompts
from addenda.core.views import LayerView
from addenda.errors import MethodError

__all__ = ["TransformerBlockView", "WeightlessView", "is_transformer_block"]

_BASES = {"GradientCheckpointingLayer", "TransformerEncoderLayer"}
"""What the blocks of transformers, and PyTorch's own, are derived from; the core imports no transformers."""


def is_transformer_block(module: nn.Module) -> bool:
    """Whether a module is a block of a transformer, which holds a norm and maps features to features.

    Example:
        >>> is_transformer_block(nn.TransformerEncoderLayer(8, 2)), is_transformer_block(nn.Linear(8, 8))
        (True, False)
    """
    return bool(_BASES & {c.__name__ for c in type(module).__mro__}) and _norm_of(module) is not None


def _norm_of(module: nn.Module) -> nn.Module | None:
    return next((part for part in module.modules() if is_norm(part)), None)


class WeightlessView(LayerView):
    """A module without a single weight, so that only methods that work on activations can stand on it."""

    called: ClassVar[str]
    """What it is called in messages."""
    instead: ClassVar[str] = "works on activations"
    """What a method does that can stand on it."""

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        self.input_name = list(inspect.signature(self.original.forward).parameters)[1]

    @property
    def has_bias(self) -> bool:
        return False

    def weight(self) -> Tensor:
        raise self._no_weight()

    def bias(self) -> Tensor | None:
        raise self._no_weight()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise self._no_weight()

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        raise self._no_weight()

    def _no_weight(self) -> MethodError:
        return MethodError(
            f"{self.called} '{self.path}' has no single weight",
            hint=f"target the linear layers inside it, or use a method that {self.instead}",
        )


class TransformerBlockView(WeightlessView):
    """A transformer block: (rows, tokens, d) to the same."""

    kind = "transformer-block"
    called = "transformer block"

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        self._norm: Any = _norm_of(module)

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        if not isinstance(y, Tensor):
            raise MethodError(
                f"'{self.path}' returns a {type(y).__name__}, not the features alone",
                hint="target the layers inside it",
            )
        return y

    @property
    def d_in(self) -> int:
        return len(self._norm.weight)

    @property
    def d_out(self) -> int:
        return len(self._norm.weight)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._norm.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._norm.weight.dtype
        return dtype

    def problems(self) -> list[str]:
        attention = getattr(self.module, "self_attn", None)
        if getattr(attention, "batch_first", True):
            return []
        return ["its first dimension is not the batch (batch_first=False)"]

    def prompts(self, y: Tensor) -> Prompts:
        named = self._named()
        mask = named.get("attention_mask")
        samples = mask if hasattr(mask, "bounds") else named.get("segments")
        if samples is not None:
            return Prompts.of_samples(samples, y.shape[1], y.device)
        real = _real_tokens(named, y)
        cache = named.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > y.shape[1]:  # an answer is being written
            return Prompts.of_rows(torch.zeros_like(real))
        return Prompts.of_rows(real, named.get("prompt_lengths"))

    def _named(self) -> dict[str, Any]:
        """What the block was called with beside its input, by name."""
        names = list(inspect.signature(self.original.forward).parameters)[2:]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def _real_tokens(named: dict[str, Any], y: Tensor) -> Tensor:
    """Which tokens are none of the padding, (rows, tokens) bool, as the masks of a call say it."""
    rows, tokens = y.shape[:2]
    hidden, mask = named.get("src_key_padding_mask"), named.get("attention_mask")
    if hidden is not None:
        real: Tensor = hidden == 0
        return real
    if mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool, device=y.device)
    if mask.dim() == 4:  # (rows or 1, heads or 1, queries, keys), of truth values or added to the scores
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = seen[:, 0].any(-2)
    found: Tensor = mask
    return found[:, :tokens].bool().expand(rows, -1)
