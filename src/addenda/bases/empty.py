"""Build a model without its weights: their shapes are there, their memory is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["empty_model"]


def empty_model(loader: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model that a config describes, its parameters on the meta device, its computed tables real.

    Args:
        loader: transformers' class for the kind of model, as ``AutoModelForCausalLM``.
        config: what to build.
        dtype: of the parameters.
    """
    with _EmptyOnMeta():
        model: PreTrainedModel = loader.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Weights, which layers make by `torch.empty`, take no memory; what is computed, as rotary tables, is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
