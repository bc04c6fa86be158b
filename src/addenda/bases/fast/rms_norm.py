"""The RMS norm: keeps its input and one number per row, where the plain form keeps three copies (arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases.fast.compiled import compiled_on_gpu
from addenda.bases.fast.fusion import Fusion, Unproven, near, probe, quietly
from addenda.core.remaking import remakable
from addenda.kernels import calls

__all__ = ["rms_norm"]

KIND = "RMS norm"


def rms_norm(module: nn.Module, _: Tensor) -> Fusion | Unproven | None:
    """Recognise ``x / sqrt(mean(x²) + eps)`` times the weight, or times one plus the weight."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    holds = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if holds != ["weight"] or not isinstance(eps, float) or list(module.children()):
        return None
    weight = module.get_parameter("weight")
    if weight.ndim != 1 or weight.is_meta:
        return None
    # One ordinary row, and one small enough for eps to show; in fp32 where the module takes it, which shows more.
    x = (probe(weight, 2, len(weight)) * torch.tensor([[1.0], [1e-3]], device=weight.device)).float()
    expected = quietly(module, x)
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype:
        x = x.to(weight.dtype)
        expected = quietly(module, x)
    for plus_one in (False, True):
        if near(_plain(x, weight.to(x.dtype), eps, plus_one=plus_one)[0], expected):
            return Fusion(KIND, module, type(module), _lean(module, eps, plus_one=plus_one))
    return None  # a layer norm without a bias holds the same


def _lean(module: nn.Module, eps: float, *, plus_one: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        # Only a gradient for the weight needs the module's own form; without one, frozen or not gives the same bits.
        if weight.requires_grad and torch.is_grad_enabled():
            own: Tensor = type(module).forward(module, x)
            return own
        frozen = weight.detach()
        out: Tensor = _RmsNorm.apply(x, frozen, eps, plus_one)
        return remakable(out, partial(_again, eps=eps, plus_one=plus_one), x, frozen)

    return forward


def _again(x: Tensor, weight: Tensor, *, eps: float, plus_one: bool) -> Tensor:
    return _norm(x, weight, eps, plus_one=plus_one)[0]


def _norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> tuple[Tensor, Tensor]:
    """x: (..., d) -> the norm, (..., d), and the factor each row was scaled by, (..., 1) fp32 or wider."""
    if calls.usable(x, weight, width=x.shape[-1]):
        out, scale = calls.rms_norm_forward(x, weight, eps, float(plus_one))
        return out, scale[..., None]
    return _plain(x, weight, eps, plus_one=plus_one)


@compiled_on_gpu
def _plain(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    )
    # A copy of its own: a cast to the same dtype is the same tensor.
    normed = wide * scale if wide is x else wide.mul_(scale)
    if plus_one:
        return normed.mul_(weight.to(wide.dtype) + 1.0).to(x.dtype), scale
    return normed.to(x.dtype).mul_(weight), scale


class _RmsNorm(torch.autograd.Function):
    """With r the row's scale and h = g w: dx = r h - x r³ mean(h x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:  # noqa: FBT001
        out, scale = _norm(x, weight, eps, plus_one=plus_one)
        ctx.save_for_backward(x, scale, weight)
        ctx.plus_one = plus_one
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        g = grads[0]
        if not torch.is_grad_enabled() and calls.usable(x, weight, g, width=x.shape[-1]):
            return calls.rms_norm_backward(x, weight, scale[..., 0], g, float(ctx.plus_one)), None, None, None
        return _plain_backward(g, x, scale, weight, plus_one=ctx.plus_one), None, None, None


@compiled_on_gpu
def _plain_backward(g: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *, plus_one: bool) -> Tensor:
    wide = x.to(scale.dtype)
    grad = g.to(scale.dtype) * (weight.to(scale.dtype) + float(plus_one))
    pull = (grad * wide).sum(-1, keepdim=True) * scale.pow(3) / -x.shape[-1]
    return (grad * scale + wide * pull).to(x.dtype)
