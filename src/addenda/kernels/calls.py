"""Call a kernel with tensors; each function here says what its kernel takes and gives.

A kernel takes tensors of one dtype, float32 or bfloat16, on the CPU; `usable`, `dequantizes`, `quantizes` and
`searches` ask before anything is made for it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from addenda.kernels.library import kernels
from addenda.memory.arena import empty

__all__ = [
    "AttentionCall",
    "activation",
    "attention_backward",
    "attention_forward",
    "cross_entropy",
    "dequantize",
    "dequantizes",
    "gated_backward",
    "gated_forward",
    "quantize",
    "quantizes",
    "rms_norm_backward",
    "rms_norm_forward",
    "search",
    "searches",
    "usable",
]

LANES = 16
"""Numbers a kernel works on at once; rows are a multiple of it."""

ACTIVATIONS = {"silu": 0, "gelu-tanh": 1, "gelu": 2}
"""What stands for an activation in the call of a kernel."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def usable(*tensors: Tensor, width: int = LANES) -> bool:
    """Whether the kernels are there and take these tensors, whose rows of `width` numbers lie whole in memory."""
    dtype = tensors[0].dtype
    if kernels() is None or dtype not in _NAMES or width % LANES:
        return False
    return all(x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous() for x in tensors)


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    _function(f"{name}_{_NAMES[dtype]}")(*(_plain(argument) for argument in arguments))


@functools.cache
def _function(name: str) -> Any:
    function = getattr(kernels(), name)
    function.restype = None
    return function


def _plain(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x: (..., d), weight: (d,) -> x / rms(x) * (weight + offset): (..., d), and each row's factor: (...,) fp32."""
    y, scale = empty(x.shape, x), empty(x.shape[:-1], x, torch.float32)
    _call("rms_norm_forward", x.dtype, x, weight, y, scale, scale.numel(), x.shape[-1], eps, offset)
    return y, scale


def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, g: Tensor, offset: float) -> Tensor:
    """Return the gradient of x: (..., d), from that of the output, g: (..., d), and the forward's scale."""
    dx = empty(x.shape, x)
    _call("rms_norm_backward", x.dtype, x, weight, scale, g, dx, scale.numel(), x.shape[-1], offset)
    return dx


def activation(x: Tensor, name: str, g: Tensor | None = None) -> Tensor:
    """Return act(x): (...), or, with the gradient ``g`` of that, the gradient of x; a multiple of 16 numbers in all."""
    y = torch.empty_like(x)
    _call("activation", x.dtype, x, g, y, x.numel(), ACTIVATIONS[name])
    return y


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up: (...) -> act(gate) * up: (...); a multiple of 16 numbers in all."""
    y = empty(gate.shape, gate)
    _call("gated_forward", gate.dtype, gate, up, y, gate.numel(), ACTIVATIONS[activation])
    return y


def gated_backward(gate: Tensor, up: Tensor, g: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and act(gate) * up made again; all of gate's shape."""
    grad_gate, grad_up, y = (empty(gate.shape, gate) for _ in range(3))
    kind = ACTIVATIONS[activation]
    _call("gated_backward", gate.dtype, gate, up, g, grad_gate, grad_up, y, gate.numel(), kind)
    return grad_gate, grad_up, y


def cross_entropy(scores: Tensor, targets: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each row, (n,) fp32, and whether its target came first, (n,) bool.

    Args:
        scores: (n, vocab); with `gradient` overwritten by their gradient, softmax less one at the target.
        targets: (n,) long, each below vocab.
        gradient: whether to overwrite them.
    """
    nll = scores.new_empty(len(scores), dtype=torch.float32)
    first = torch.empty(len(scores), dtype=torch.bool)
    _call("cross_entropy", scores.dtype, scores, targets, nll, first, *scores.shape, int(gradient))
    return nll, first


def dequantizes(weight_format: str, raw: Tensor, out: Tensor) -> bool:
    """Whether there is a kernel for the format that decodes ``raw`` into ``out``."""
    if out.dtype not in _NAMES or not hasattr(kernels(), f"dequantize_{weight_format}_{_NAMES[out.dtype]}"):
        return False
    return all(x.device.type == "cpu" and x.is_contiguous() for x in (raw, out))


def dequantize(weight_format: str, raw: Tensor, out: Tensor) -> Tensor:
    """raw: (rows, bytes of a row) uint8 of whole blocks -> out: (rows, d_in), written and returned."""
    _call(f"dequantize_{weight_format}", out.dtype, raw, out, *raw.shape, out.shape[1])
    return out


def quantizes(weight_format: str, weight: Tensor) -> bool:
    """Whether there is a kernel that packs ``weight`` into the format."""
    there = weight.dtype == torch.float32 and hasattr(kernels(), f"quantize_{weight_format}_float32")
    return there and weight.device.type == "cpu" and weight.is_contiguous()


def quantize(weight_format: str, weight: Tensor, row_bytes: int) -> Tensor:
    """weight: (rows, d_in) of whole blocks, finite -> its raw rows, (rows, row_bytes) uint8."""
    raw = torch.empty(len(weight), row_bytes, dtype=torch.uint8)
    _call(f"quantize_{weight_format}", weight.dtype, weight, raw, *raw.shape, weight.shape[1])
    return raw


def searches(weight_format: str) -> bool:
    """Whether there is a kernel that searches for the format's scales."""
    return hasattr(kernels(), f"search_{weight_format}_float32")


def search(weight_format: str, blocks: Tensor, block_bytes: int) -> Tensor:
    """blocks: (n, weights) finite float32 on the CPU, contiguous -> (n, block_bytes) uint8."""
    raw = torch.empty(len(blocks), block_bytes, dtype=torch.uint8)
    _call(f"search_{weight_format}", blocks.dtype, blocks, raw, len(blocks))
    return raw


class _Layer(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "heads", "key_heads", "d", "d_v", "rotated", "segments",
                "q_head", "q_token", "k_head", "k_token", "v_head", "v_token", "out_token",
                "window", "causal",
            )
        ),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]  # fmt: skip


class AttentionCall:
    """One layer's attention: its tensors and its rule, checked once for forward and backward.

    Args:
        query: (heads, T, d), any strides but the last, which is 1; likewise
        key: (key_heads, T, d) and
        value: (key_heads, T, d_v).
        rotary: cos and sin, (T, width) each, by which queries and keys are still to be turned; or None.
        bounds: start and end of each segment; together they cover the row's tokens from the first on.
        scaling: factor on the scores.
        window: a token sees itself and the ``window - 1`` before it; 0 for no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 leaves them.
        causal: whether a token sees only itself and those before it.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        bounds: Sequence[tuple[int, int]],
        *,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        causal: bool = True,
    ) -> None:
        self.tensors = (query, key, value, *(rotary or (None, None)))
        self.bounds = (ctypes.c_int64 * (2 * len(bounds)))(*(edge for pair in bounds for edge in pair))
        strides = [stride for x in (query, key, value) for stride in x.stride()[:2]]
        self.out_shape = (query.shape[1], query.shape[0], value.shape[-1])
        self.layer = _Layer(
            len(query), len(key), query.shape[-1], value.shape[-1], rotary[0].shape[-1] if rotary else 0,
            len(bounds), *strides, len(query) * value.shape[-1], window, int(causal), scaling, softcap,
        )  # fmt: skip

    @staticmethod
    def takes(query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None) -> bool:
        """Whether the kernel is there and can do this."""
        widths = query.shape[-1] % LANES == 0 and value.shape[-1] % LANES == 0
        if not (widths and usable(query[:0], key[:0], value[:0])):
            return False
        if rotary and not (usable(query[:0], *rotary) and rotary[0].shape[-1] % (2 * LANES) == 0):
            return False
        return all(x.stride(-1) == 1 for x in (query, key, value))


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (T, heads, d_v), zeros outside all segments, and the log-sum-exps (heads, T) fp32."""
    query = call.tensors[0]
    assert query is not None
    end = max(call.bounds, default=0)
    out, log_sums = empty(call.out_shape, query), empty(query.shape[:2], query, torch.float32)
    out[end:], log_sums[:, end:] = 0, 0
    _call(
        "attention_forward", query.dtype, ctypes.byref(call.layer), call.bounds, query.shape[1], *call.tensors,
        out, log_sums,
    )  # fmt: skip
    return out, log_sums


def attention_backward(
    call: AttentionCall, out: Tensor, log_sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each contiguous as (T, its heads, its d)."""
    query, key, value = call.tensors[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    grads = [empty((x.shape[1], x.shape[0], x.shape[2]), x) for x in (query, key, value)]
    for made in grads:
        made[max(call.bounds, default=0) :] = 0
    _call(
        "attention_backward", query.dtype, ctypes.byref(call.layer), call.bounds, query.shape[1], *call.tensors,
        out, log_sums, grad, *grads,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]
