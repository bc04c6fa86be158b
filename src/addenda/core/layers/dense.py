"""Layers that are called for their one weight: linear ones, convolutions, embeddings, norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.foreign import QuantizedView, is_quantized
from addenda.core.layers.kind import LayerKind
from addenda.core.norms import NormView, is_norm
from addenda.core.packed_layers import PackedLinear, PackedView
from addenda.core.parts import reading
from addenda.core.views import LayerView, LinearView

__all__ = ["DENSE"]


class TransposedView(LinearView):
    """transformers' ``Conv1D`` (GPT-2): a linear layer with its weight stored as (d_in, d_out)."""

    kind = "conv1d-transposed"
    input_name = "x"

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def linear(self, x: Tensor) -> Tensor:
        return torch.addmm(self.module.bias, x, self.stored())

    def grad_input(self, g: Tensor) -> Tensor:
        return g @ self.stored().t()

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        return total.addmm_(g, self.stored().t())

    def _runs_the_plain_product(self) -> bool:
        return bool(self.original.__name__ == "Conv1D")


_CONV_OPERATIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvView(LayerView):
    """``nn.Conv1d/2d/3d``, grouped or not: weight (d_out, channels_in / groups, *kernel)."""

    kind = "conv"

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        self._has_own_form = self._computes_otherwise()

    @property
    def channels_in(self) -> int | None:
        return int(self.module.in_channels)

    @property
    def groups(self) -> int:
        return int(self.module.groups)

    @property
    def _space(self) -> int:
        return len(self.module.kernel_size)

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *self.stored().shape[1:])

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._operate(x, self.from_matrix(weight), bias)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Convolve with A's kernels into rank channels, then mix them by a convolution of size one with B.

        With groups, each group of inputs is convolved with the same A and mixed by its own rows of B.
        """
        h = self._operate(x, self._kernels(A), None)
        mix = B.reshape(-1, A.shape[0], *[1] * self._space)
        return _CONV_OPERATIONS[self._space](h, mix, groups=self.module.groups)

    def _kernels(self, A: Tensor) -> Tensor:
        """A as the layer stores a weight, once for each group."""
        return self.from_matrix(A).repeat(self.module.groups, *[1] * (self._space + 1))

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with a weight as it stores it, of any number of output channels."""
        return self._through(x, weight, bias) if self._has_own_form else self._plain(x, weight, bias)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.module._conv_forward(x, weight, bias)
        return y

    def _through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Let the layer's own forward read another weight."""
        with reading({(self.module, "weight"): weight, (self.module, "bias"): bias}):
            y: Tensor = self.original.forward(self.module, x, *self.args, **self.kwargs)
        return y

    def _computes_otherwise(self) -> bool:
        """Whether the layer is a convolution of some form of its own: one that pads its input itself, for example.

        A subclass whose forward is linear in the weight is one; its forward is then the one that counts.
        """
        weight = self.module._parameters.get("weight")
        if self.runs_plain_forward() or weight is None or weight.is_meta:
            return False
        with torch.no_grad():
            try:
                once, twice = (self._through(self.sample(), times * weight, None) for times in (1, 2))
            except (RuntimeError, TypeError, ValueError):  # it asks for more than an input
                return False
        whole = isinstance(once, Tensor) and isinstance(twice, Tensor)
        return whole and not bool((twice - 2 * once).abs().max() > 0.01 * twice.abs().max())

    def sample(self) -> Tensor:
        reach = zip(self.module.kernel_size, self.module.dilation, strict=True)
        return self._random(1, self.module.in_channels, *[size * step for size, step in reach])

    def inputs_last(self, x: Tensor) -> Tensor:
        return x.movedim(-1 - self._space, -1)

    def inputs_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -1 - self._space)

    def outputs_last(self, y: Tensor) -> Tensor:
        return self.inputs_last(y)

    def outputs_back(self, y: Tensor) -> Tensor:
        return self.inputs_back(y)


_TRANSPOSED_OPERATIONS: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class TransposedConvView(ConvView):
    """``nn.ConvTranspose1d/2d/3d``, grouped or not: weight (channels_in, d_out / groups, *kernel)."""

    kind = "transposed-conv"

    @property
    def d_in(self) -> int:
        return int(self.module.in_channels // self.module.groups * math.prod(self.module.kernel_size))

    @property
    def d_out(self) -> int:
        return int(self.module.out_channels)

    def to_matrix(self, stored: Tensor) -> Tensor:
        return self._swapped(stored).flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        inputs = self.module.in_channels // self.module.groups
        return self._swapped(matrix.reshape(self.d_out, inputs, *self.module.kernel_size))

    def _swapped(self, weight: Tensor) -> Tensor:
        """Exchange inputs and outputs within each group: the first two dimensions."""
        groups = self.module.groups
        grouped = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)

    def _kernels(self, A: Tensor) -> Tensor:
        kernels = A.reshape(len(A), -1, *self.module.kernel_size).transpose(0, 1)
        return kernels.repeat(self.module.groups, *[1] * (self._space + 1))

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module, output_size = self.module, next(iter((*self.args, *self.kwargs.values())), None)
        added = module._output_padding(
            x, output_size, module.stride, module.padding, module.kernel_size, self._space, module.dilation
        )
        return _TRANSPOSED_OPERATIONS[self._space](
            x, weight, bias, module.stride, module.padding, added, module.groups, module.dilation
        )

    def sample(self) -> Tensor:
        return self._random(1, self.module.in_channels, *[2] * self._space)


class EmbeddingView(LayerView):
    """``nn.Embedding``: weight stored as (rows, features), shown as (features, rows)."""

    kind = "embedding"

    @property
    def channels_in(self) -> int | None:
        return None

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def sample(self) -> Tensor:
        return torch.arange(min(4, self.d_in), device=self.device)

    def add_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.original.forward is not nn.Embedding.forward:
            return super().add_weight(x, weight, bias)
        # Rows are added after they were looked up: the table is not.
        return (self(x) + self.apply(x, weight, bias)).to(self.dtype)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._scaled(self._looked_up(x, weight))
        return y if bias is None else y + bias

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._scaled(F.linear(self._looked_up(x, A), B))

    def _looked_up(self, x: Tensor, weight: Tensor) -> Tensor:
        """Look the columns of a (features, rows) weight up; as in the layer itself, the padding gives no gradient."""
        module = self.module
        return F.embedding(x, weight.t(), module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)

    def _scaled(self, y: Tensor) -> Tensor:
        """Put on ``y`` the factor that embeddings such as Gemma's have for what they look up."""
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


def _is_linear(module: nn.Module) -> bool:
    # Integer codes under a Linear subclass are somebody's weight format, not a plain layer.
    return isinstance(module, nn.Linear) and module.weight.is_floating_point()


def _is_transposed(module: nn.Module) -> bool:
    # Recognised by name and shape, because the core does not import transformers.
    names = {c.__name__ for c in type(module).__mro__}
    weight = getattr(module, "weight", None)
    return "Conv1D" in names and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2


def _is_plain_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

DENSE: tuple[LayerKind, ...] = (
    LayerKind(
        "packed-linear",
        lambda m: isinstance(m, PackedLinear),
        PackedView,
        linear=True,
        stands_for="linear",
    ),
    LayerKind("quantized-linear", is_quantized, QuantizedView, linear=True, stands_for="linear"),
    LayerKind("linear", _is_linear, LinearView, linear=True),
    LayerKind("conv1d-transposed", _is_transposed, TransposedView, linear=True),
    LayerKind("conv", lambda m: isinstance(m, _CONVOLUTIONS), ConvView),
    LayerKind(
        "transposed-conv",
        lambda m: isinstance(m, _TRANSPOSED_CONVOLUTIONS),
        TransposedConvView,
        stands_for="conv",
    ),
    LayerKind("embedding", _is_plain_embedding, EmbeddingView),
    LayerKind("norm", is_norm, NormView),
)
"""The first row that matches a module is its kind."""
