"""Leaner forms of two parts that most decoders share: the RMS norm and the gated MLP.

Where matrix units make products nearly free, a training step spends its time and memory on what lies between them. The
forms here take fewer passes over the data and keep only what the backward cannot make again: a norm keeps its input
and one number per row instead of three copies; a gated MLP keeps gate and up, not the activation.

A module is recognised by what it holds and proven by what it computes, never by its name. `fused_on` lends it the lean
forward for the length of a ``with`` block; its class, parameters and hooks stay, and layers inside it are called as
the modules they are, so that adapters run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from addenda.core.packed_layers import PackedLinear

__all__ = ["Fusion", "find_fusions", "forward_replaced", "fused_on"]


@dataclass(frozen=True)
class Fusion:
    """One module and its lean forward."""

    kind: str
    """``RMS norm`` or ``gated MLP``."""
    module: nn.Module
    """The module, as it is in the model."""
    original: type[nn.Module]
    """Its class when it was proven; under another class (an adapter's host) it is left alone."""
    forward: Callable[[Tensor], Tensor]
    """What it runs instead of its own forward."""


def find_fusions(model: nn.Module) -> tuple[Fusion, ...]:
    """Return a fusion for each module of `model` that is recognised and proven.

    Example:
        >>> find_fusions(nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.LayerNorm(8)))[0].kind
        'RMS norm'
    """
    found = (_rms_norm(module) or _gated_mlp(module) for module in model.modules())
    return tuple(fusion for fusion in found if fusion is not None)


@contextmanager
def fused_on(fusions: Sequence[Fusion]) -> Iterator[None]:
    """Run the lean forwards within the block."""
    with ExitStack() as stack:
        for fusion in fusions:
            if type(fusion.module) is fusion.original and "forward" not in vars(fusion.module):
                stack.enter_context(forward_replaced(fusion.module, fusion.forward))
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let this one module run `forward` within the block; its class is not touched."""
    former = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if former is not None:
            vars(module)["forward"] = former


# ---------------------------------------------------------------------------------------------------------- RMS norm


def _rms_norm(module: nn.Module) -> Fusion | None:
    """Recognise ``x / sqrt(mean(x²) + eps)`` times the weight, or times one plus the weight."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    holds = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if holds != ["weight"] or not isinstance(eps, float) or list(module.children()):
        return None
    weight = module.get_parameter("weight")
    if weight.ndim != 1 or weight.is_meta:
        return None
    # One ordinary row, and one small enough for eps to show.
    x = _probe(weight, 2, len(weight)) * torch.tensor(
        [[1.0], [1e-3]], dtype=weight.dtype, device=weight.device
    )
    expected = _quietly(module, x)
    for plus_one in (False, True):
        if expected is not None and _near(_rms(x, weight, eps, plus_one=plus_one)[0], expected):
            return Fusion("RMS norm", module, type(module), _rms_forward(module, eps, plus_one=plus_one))
    return None


def _rms_forward(module: nn.Module, eps: float, *, plus_one: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        # Only a gradient for the weight needs the module's own form; without one, frozen or not gives the same bits.
        if weight.requires_grad and torch.is_grad_enabled():
            own: Tensor = type(module).forward(module, x)
            return own
        out: Tensor = _RmsNorm.apply(x, weight, eps, plus_one)
        return out

    return forward


def _rms(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> tuple[Tensor, Tensor]:
    """The norm, and ``(..., 1)`` fp32: the factor each row was scaled by."""
    wide = x.float()
    scale = (
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    )
    # A copy of its own: .float() of a float is the same tensor.
    normed = wide * scale if wide is x else wide.mul_(scale)
    if plus_one:
        return normed.mul_(_factor(weight, plus_one=True)).to(x.dtype), scale
    return normed.to(x.dtype).mul_(weight), scale


def _factor(weight: Tensor, *, plus_one: bool) -> Tensor:
    return weight.float() + 1.0 if plus_one else weight.float()


class _RmsNorm(torch.autograd.Function):
    """With r the row's scale and h = g w: dx = r h - x r³ mean(h x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:  # noqa: FBT001
        out, scale = _rms(x, weight, eps, plus_one=plus_one)
        ctx.save_for_backward(x, scale, weight)
        ctx.plus_one = plus_one
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        wide = x.float()
        grad = grads[0].float() * _factor(weight, plus_one=ctx.plus_one)
        pull = (grad * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return grad.mul_(scale).addcmul_(wide, pull).to(x.dtype), None, None, None


# --------------------------------------------------------------------------------------------------------- gated MLP

_Backward = Callable[[Tensor, Tensor], Tensor]

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], _Backward]] = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
    "gelu-tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}
"""Activations and their backward, from the gradient and the input."""


def _gated_mlp(module: nn.Module) -> Fusion | None:
    """Recognise ``down(act(gate(x)) * up(x))``."""
    names = {name for name, _ in module.named_children()}
    parts = {"gate_proj", "up_proj", "down_proj"}
    if not parts <= names <= parts | {"act_fn"} or list(module.parameters(recurse=False)):
        return None
    width, like = _input_of(module.get_submodule("gate_proj"))
    act = getattr(module, "act_fn", None)
    if like is None or like.is_meta or not callable(act):
        return None
    x = _probe(like, 2, width)
    expected, shape = _quietly(module, x), _quietly(act, _probe(like, 2, 64) * 4)
    for name, (activation, _) in ACTIVATIONS.items():
        if shape is None or not _near(activation(_probe(like, 2, 64) * 4), shape):
            continue
        forward = _gated_forward(module, name)
        with torch.no_grad():
            if expected is not None and _near(forward(x), expected):
                return Fusion("gated MLP", module, type(module), forward)
    return None


def _input_of(layer: nn.Module) -> tuple[int, Tensor | None]:
    """Features of a linear layer's input, and a tensor of its dtype and device; None where it is no such layer."""
    if isinstance(layer, PackedLinear):
        return layer.in_features, next(layer.buffers()).new_empty(0, dtype=layer.compute_dtype)
    weight = getattr(layer, "weight", None)
    return (weight.shape[1], weight) if isinstance(weight, Tensor) and weight.ndim == 2 else (0, None)


def _gated_forward(module: nn.Module, activation: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up = module.get_submodule("gate_proj")(x), module.get_submodule("up_proj")(x)
        out: Tensor = module.get_submodule("down_proj")(_Gated.apply(gate, up, activation))
        return out

    return forward


class _Gated(torch.autograd.Function):
    """``act(gate) * up``; the activation is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        activate, backward = ACTIVATIONS[ctx.activation]
        (grad,) = grads
        return backward(grad * up, gate), activate(gate).mul_(grad), None


# ------------------------------------------------------------------------------------------------------------- proof


def _probe(like: Tensor, rows: int, columns: int) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return made.to(like.dtype).to(like.device)


def _quietly(function: Callable[[Tensor], Any], x: Tensor) -> Tensor | None:
    """The answer of a module that may not be what it looks like; None where it cannot take `x` or gives no tensor."""
    try:
        with torch.no_grad():
            out = function(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None
    return out if isinstance(out, Tensor) else None


def _near(x: Tensor, y: Tensor) -> bool:
    """Equal but for the last bit or two of each element's dtype; norms run in fp32 in any."""
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    return x.shape == y.shape and bool(torch.allclose(x.double(), y.double(), rtol=4 * eps, atol=4 * eps))
