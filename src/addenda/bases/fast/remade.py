"""Layer norms and activations as they are, but for one thing: the layer that reads their output need not keep it.

Both keep their input for their own backward, and one pass over it makes the output again (`addenda.core.remaking`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from addenda.bases.fast.fusion import Fusion
from addenda.bases.fast.gated_mlp import ACTIVATIONS, activation_of
from addenda.core.remaking import remakable
from addenda.core.views import autocast_on
from addenda.kernels import calls

__all__ = ["activation", "layer_norm"]


def layer_norm(module: nn.Module, _: Tensor) -> Fusion | None:
    """Recognise ``nn.LayerNorm`` itself; a subclass may do more."""
    if type(module) is not nn.LayerNorm:
        return None

    def forward(x: Tensor) -> Tensor:
        # Frozen or not: before the backward ends nothing may change them, by autograd's own rule.
        weight, bias = (None if w is None else w.detach() for w in (module.weight, module.bias))
        again = partial(_layer_norm, shape=module.normalized_shape, weight=weight, bias=bias, eps=module.eps)
        return _marked(nn.LayerNorm.forward(module, x), again, x)

    return Fusion("layer norm", module, type(module), forward)


def _layer_norm(
    x: Tensor, *, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return functional.layer_norm(x, shape, weight, bias, eps)


def activation(module: nn.Module, like: Tensor) -> Fusion | None:
    """Recognise a SiLU or a GELU of either kind by its values, whatever the module is called."""
    holds = [*module.children(), *module.parameters(), *module.buffers()]
    name = None if holds or isinstance(module, nn.Identity | nn.Dropout) else activation_of(module, like)
    if name is None:
        return None

    def forward(x: Tensor) -> Tensor:
        if x.requires_grad and calls.usable(x, width=x.numel()):
            y: Tensor = _Activation.apply(x, name)
        else:
            y = ACTIVATIONS[name][0](x)
        return _marked(y, partial(_activated, name=name), x)

    return Fusion("activation", module, type(module), forward)


def _activated(x: Tensor, *, name: str) -> Tensor:
    if calls.usable(x, width=x.numel()):
        return calls.activation(x, name)
    return ACTIVATIONS[name][0](x)


class _Activation(torch.autograd.Function):
    """The activation by its kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return calls.activation(x, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return calls.activation(x, ctx.name, grads[0].contiguous()), None


def _marked(y: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Mark `y` where something will be kept for a backward, and where the backward makes the same bits."""
    plain = not autocast_on(y) and not torch.compiler.is_compiling()
    return remakable(y, make, *tensors) if y.requires_grad and plain else y
