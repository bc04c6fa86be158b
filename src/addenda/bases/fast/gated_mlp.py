"""The gated MLP, ``down(act(gate(x)) * up(x))``, as one node that keeps gate and up alone (arXiv:2002.05202).

The product that goes into the down projection is made again in the backward, in the same pass that makes the gradients
of gate and up; so is the input where it is the output of a fused norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from addenda.bases.fast.compiled import compiled_on_gpu
from addenda.bases.fast.fusion import Fusion, Unproven, near, probe, quietly
from addenda.core.host import count_call
from addenda.core.remaking import Remade, kept
from addenda.core.sharing import term_of
from addenda.core.terms import Terms, factors_of, terms_factor_grads, terms_forward, terms_input_grad
from addenda.kernels import calls

__all__ = ["ACTIVATIONS", "activation_of", "gated_mlp"]

KIND = "gated MLP"
PARTS = ("gate_proj", "up_proj", "down_proj")

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


def activation_of(act: Callable[..., Any], like: Tensor) -> str | None:
    """Return which of `ACTIVATIONS` computes what `act` does, number by number, or None."""
    # In fp32, where SiLU and GELU cannot be taken for one another, and as a column: each number by itself.
    z = probe(like, 64, 1).float() * 4
    shape = quietly(act, z)
    return next(
        (name for name, (function, _) in ACTIVATIONS.items() if near(function(z), shape, units=64)), None
    )


def gated_mlp(module: nn.Module, like: Tensor) -> Fusion | Unproven | None:
    """Recognise ``down(act(gate(x)) * up(x))``."""
    names = {name for name, _ in module.named_children()}
    if not set(PARTS) <= names or list(module.parameters(recurse=False)):
        return None
    act, width = getattr(module, "act_fn", None), getattr(module.get_submodule("gate_proj"), "in_features", 0)
    if not width:
        return None
    if names - {*PARTS, "act_fn"} or not callable(act):
        return Unproven(KIND, module, "it holds more than gate, up, down and an activation")
    name = activation_of(act, like)
    if name is None:
        return Unproven(KIND, module, "its activation is none of " + ", ".join(ACTIVATIONS))
    forward, x = _lean(module, name), probe(like, 2, width)
    if not near(quietly(forward, x), quietly(module, x), units=16):
        return Unproven(KIND, module, "it computes something other than down(act(gate) * up)")
    return Fusion(KIND, module, type(module), forward, covers=tuple(module.children()))


def _lean(module: nn.Module, activation: str) -> Callable[[Tensor], Tensor]:
    gate_proj, up_proj, down_proj = (module.get_submodule(part) for part in PARTS)

    def forward(x: Tensor) -> Tensor:
        found = [term_of(part, x) for part in (gate_proj, up_proj, down_proj)]
        terms = [term for term in found if term is not None]
        if len(terms) < len(found):
            out: Tensor = down_proj(_Gated.apply(gate_proj(x), up_proj(x), activation))
            return out
        for term in terms:
            count_call(term.host)
        inputs, down = Terms(terms[:2]), Terms(terms[2:])
        whole: Tensor = _GatedMLP.apply(x, inputs, down, kept(x), activation, *factors_of(terms))
        return whole

    return forward


class _GatedMLP(torch.autograd.Function):
    """The whole MLP, its three layers frozen or low-rank adapted."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position only)
        ctx: Any, x: Tensor, inputs: Terms, down: Terms, keep: Remade, activation: str, *factors: Any
    ) -> Tensor:
        (gate, up), h = terms_forward(x.reshape(-1, x.shape[-1]), inputs)
        (out,), h_down = terms_forward(_gated(gate, up, activation), down)
        ctx.save_for_backward(gate, up, h, h_down, *(keep.tensors if h.shape[1] else ()))
        ctx.inputs, ctx.down, ctx.activation = inputs, down, activation
        ctx.make, ctx.shape = keep.make, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up, h, h_down, *ingredients = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        grad_gated, inner_down = terms_input_grad([g], ctx.down)
        assert grad_gated is not None
        grad_gate, grad_up, gated = _gated_backward(gate, up, grad_gated, ctx.activation)
        factors_down = terms_factor_grads([g], inner_down, gated, h_down, ctx.down)
        del grad_gated, gated
        both = [grad_gate, grad_up]
        dx, inner = terms_input_grad(both, ctx.inputs, wanted=ctx.needs_input_grad[0])
        factors: list[Tensor | None] = [None] * len(factors_of(ctx.inputs))
        if ingredients:
            rows = ctx.make(*ingredients).reshape(-1, ctx.shape[-1])
            factors = terms_factor_grads(both, inner, rows, h, ctx.inputs)
        return (None if dx is None else dx.view(ctx.shape)), None, None, None, None, *factors, *factors_down


class _Gated(torch.autograd.Function):
    """``act(gate) * up`` alone, where one of the layers has to be called; the activation is made again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, _ = _gated_backward(gate, up, grads[0].contiguous(), ctx.activation)
        return grad_gate, grad_up, None


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if _kernel_takes(activation, gate, up):
        return calls.gated_forward(gate, up, activation)
    return _plain(gate, up, activation)


@compiled_on_gpu
def _plain(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](gate).mul_(up)


def _gated_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and act(gate) * up again."""
    if _kernel_takes(activation, gate, up, grad):
        return calls.gated_backward(gate, up, grad, activation)
    return _plain_backward(gate, up, grad, activation)


@compiled_on_gpu
def _plain_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    activate, backward = ACTIVATIONS[activation]
    active = activate(gate)
    return backward(grad * up, gate), active * grad, active.mul_(up)


def _kernel_takes(activation: str, *tensors: Tensor) -> bool:
    return activation in calls.ACTIVATIONS and calls.usable(*tensors, width=tensors[0].numel())
