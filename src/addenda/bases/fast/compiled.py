"""What a GPU runs in place of the kernels: the same plain PyTorch, which `torch.compile` fuses into one pass each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["SETTINGS", "compiled", "compiled_on_gpu", "runs_compiled", "why_not_compiled"]

SETTINGS: dict[str, Any] = {"recompile_limit": 64, "specialize_float": True}
"""For PyTorch's compiler, while ours are compiled. A function may have so many forms, one for each kind of arguments: a
model needs a handful, and past the limit PyTorch would run it uncompiled, which for attention takes memory of the size
length x length. A number is a constant of its form: as a variable, a soft cap could not be compiled into attention."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled_on_gpu(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function of tensors run compiled where the first of them lies on a GPU, and as it is elsewhere.

    Example:
        >>> @compiled_on_gpu
        ... def doubled(x):
        ...     return x * 2
        >>> doubled(torch.ones(2))
        tensor([2., 2.])
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return compiled(function)(*args, **kwargs) if runs_compiled(args[0]) else function(*args, **kwargs)

    return run


def runs_compiled(x: Any) -> bool:
    """Whether work on this tensor is left to PyTorch's compiler."""
    return isinstance(x, Tensor) and x.is_cuda and not why_not_compiled()


@functools.cache
def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the compiled form of a function; a new kind of arguments compiles it anew, whole or not at all."""
    form: Callable[..., Any] = torch.compile(function, fullgraph=True)

    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch._dynamo.config.patch(SETTINGS):
            result: _R = form(*args, **kwargs)
        return result

    return run


@functools.cache
def why_not_compiled() -> str:
    """Return "" where PyTorch can compile for the GPU, else why not; found by trying, once."""
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "PyTorch's compiler is turned off (TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE)"
    try:
        torch.compile(torch.square)(torch.ones(16, device="cuda"))
    except (RuntimeError, ImportError, OSError, AssertionError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""
