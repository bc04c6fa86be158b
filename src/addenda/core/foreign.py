"""Linear layers that another library quantised: its module is called as it is, and its own autograd is trusted.

bitsandbytes, torchao, GPTQ and AWQ are told by the shape of their modules; none is imported before a model has brought
it along. Whether a layer really gives the gradient of its input is tried when an attach is planned.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.views import CompressedView

__all__ = ["QuantizedView", "is_quantized", "keep_inputs", "keep_layout", "quantized_numel"]

_ROWS_AT_ONCE = 1024


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear layer that bitsandbytes, torchao, GPTQ or AWQ has quantised."""
    if isinstance(module, nn.Linear):
        weight = module._parameters.get("weight")
        return _comes_from("bitsandbytes", type(module)) or _comes_from("torchao", type(weight))
    codes = getattr(module, "qweight", None)  # GPTQ and AWQ
    return isinstance(codes, Tensor) and hasattr(module, "scales") and hasattr(module, "in_features")


def quantized_numel(model: nn.Module) -> int:
    """Return how many numbers the layers have that other libraries quantised."""
    found: list[Any] = [module for module in model.modules() if is_quantized(module)]
    return sum(layer.in_features * layer.out_features for layer in found)


def _comes_from(library: str, cls: type) -> bool:
    return any(c.__module__.split(".")[0] == library for c in cls.__mro__)


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from packing its weights anew for inference on a CPU: a layer so packed gives no gradient."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no module of ours)
            module.state_dict()  # undoes a packing that an earlier forward made


def keep_inputs(model: nn.Module) -> None:
    """Stop bitsandbytes' layers of eight bits from rounding their inputs, as on a CPU they do when not in training."""
    for module in model.modules():
        if _comes_from("bitsandbytes", type(module)) and hasattr(module, "state"):
            module.training = True


class QuantizedView(CompressedView):
    """A layer quantised by another library; inputs may have any dtype that it takes."""

    kind = "quantized-linear"

    @property
    def dtype(self) -> torch.dtype:
        state = getattr(getattr(self.module, "weight", None), "quant_state", None)
        if state is not None:  # bitsandbytes: the dtype that the weight had
            dtype: torch.dtype = state.dtype
            return dtype
        held = (getattr(self.module, name, None) for name in ("weight", "scales", "bias"))
        floating = (t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point())
        return next(floating, torch.float32)

    def weight(self) -> Tensor:
        """Return what the layer answers to unit vectors, less its bias; no format has to be understood for it."""
        bias = self.bias()
        parts = []
        with torch.no_grad():
            for start in range(0, self.d_in, _ROWS_AT_ONCE):
                rows = min(_ROWS_AT_ONCE, self.d_in - start)
                units = torch.zeros(rows, self.d_in, dtype=self.dtype, device=self.device)
                units[:, start : start + rows].fill_diagonal_(1)
                y: Tensor = self.original.forward(self.module, units)
                parts.append(y if bias is None else y - bias.to(y.dtype))
        return torch.cat(parts).t().contiguous()

    def exact_weight(self) -> Tensor:
        """The weight in float32; a layer of bitsandbytes' as it is when the layer computes in float32; detached."""
        if not _comes_from("bitsandbytes", self.original):
            return super().exact_weight()
        weight, state = self.module.weight, getattr(self.module.weight, "quant_state", None)
        if state is None:
            held = self.module.state.SCB  # there from the first forward on
            scale = (weight.SCB if held is None else held).float() * (1 / 127)
            exact: Tensor = weight.data.float() * scale[:, None]
            return exact
        wide = copy.copy(state)
        wide.dtype = torch.float32
        unpack = importlib.import_module("bitsandbytes.functional").dequantize_4bit
        return cast(Tensor, unpack(weight.data, wide))

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return self(x) + scaling * self.low_rank(x, A, B)

    def fusible(self, x: Tensor) -> bool:
        return False

    def problems(self) -> list[str]:
        name = self.original.__name__
        if getattr(getattr(self.module, "weight", None), "bnb_quantized", None) is False:
            return [f"{name} is not quantized yet: move the model to its device first, as by model.to('cpu')"]
        try:
            found = self._trial()
        except Exception as problem:  # noqa: BLE001  whatever a foreign kernel raises, the layer cannot be trained through
            found = f"{type(problem).__name__}: {problem}"
        return [f"{name} gives no gradient of its input ({found})"] if found else []

    def _trial(self) -> str | None:
        """Run the layer forward and backward on a small input; return what is wrong with the gradient."""
        with torch.enable_grad():
            x = self.sample().requires_grad_()
            y: Tensor = self.original.forward(self.module, x)
            if not y.requires_grad:
                return "its output is not differentiable"
            (gradient,) = torch.autograd.grad(y.float().square().sum(), x, allow_unused=True)
        if gradient is None:
            return "its backward leaves it out"
        usable = bool(gradient.isfinite().all()) and bool(gradient.any())
        return None if usable else "it is zero or not finite"
