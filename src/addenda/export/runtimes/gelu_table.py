"""The GELU of llama.cpp, which it looks up, put into a PyTorch model to see what that changes.

ggml's processor backend rounds a GELU's input to float16 and reads the result, again float16, from a table of 65,536
entries of the tanh form (``ggml_vec_gelu_f32``, ``ggml_vec_geglu_f32``). Each result is off by up to a thousandth of
itself, and where an input lies at the middle of two float16 numbers its last bit decides which entry is read. So two
right programs drift apart within a few layers: a PyTorch model with this very table stays within a tenth of the
difference for two layers of Gemma 3 270M, and is as far off as one without it after eighteen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["gelu_by_table", "gelus_of", "with_gelu_table"]

_LARGE = 10.0
"""From here on GELU is taken for the input itself, and below its negative for zero."""


def gelu_by_table(x: Tensor) -> Tensor:
    """Return GELU as ggml computes it for float32.

    Example:
        >>> gelu_by_table(torch.tensor([-11.0, 0.5, 11.0]))
        tensor([ 0.0000,  0.3457, 11.0000])
    """
    looked_up = F.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x >= _LARGE, x, looked_up.masked_fill(x <= -_LARGE, 0.0))


def gelus_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's GELUs of any form, by the names of their classes; llama.cpp reads them all from one table."""
    return [module for module in model.modules() if "gelu" in type(module).__name__.lower()]


@contextmanager
def with_gelu_table(model: nn.Module) -> Iterator[None]:
    """Compute the model's GELUs by the table for a while."""
    with ExitStack() as hooks:
        for module in gelus_of(model):
            hook = module.register_forward_hook(lambda _module, inputs, _output: gelu_by_table(inputs[0]))
            hooks.callback(hook.remove)
        yield
