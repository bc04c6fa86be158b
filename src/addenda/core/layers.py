"""The table of layer kinds: which modules are of which kind, and how each kind is shown to a method.

A new kind is one class and one row of ``KINDS``; no method, and nothing of the life cycle, knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.blocks import TransformerBlockView, WeightlessView, is_transformer_block
from addenda.core.foreign import QuantizedView, is_quantized
from addenda.core.norms import NormView, is_norm
from addenda.core.packed_layers import PackedLinear, PackedView
from addenda.core.transformer import AttentionView, TransformerView, is_attention, is_transformer
from addenda.core.views import LayerView, LinearView
from addenda.errors import MethodError

__all__ = ["KINDS", "LayerKind", "LayerView", "kind_of", "view_of"]


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
        y: Tensor = self.module._conv_forward(x, self.from_matrix(weight), bias)
        return y

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Convolve with A's kernels into rank channels, then mix them by a convolution of size one with B.

        With groups, each group of inputs is convolved with the same A and mixed by its own rows of B.
        """
        groups, rank, operation = self.module.groups, A.shape[0], _CONV_OPERATIONS[self._space]
        h = operation(
            self._padded(x), self._grouped(A), None, self.module.stride, 0, self.module.dilation, groups
        )
        return operation(h, B.reshape(-1, rank, *[1] * self._space), groups=groups)

    def _grouped(self, A: Tensor) -> Tensor:
        return self.from_matrix(A).repeat(self.module.groups, *[1] * (self._space + 1))

    def _padded(self, x: Tensor) -> Tensor:
        mode = self.module.padding_mode
        return F.pad(
            x, self.module._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode
        )

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
        y = self._scaled(F.embedding(x, weight.t()))
        return y if bias is None else y + bias

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._scaled(F.linear(F.embedding(x, A.t()), B))

    def _scaled(self, y: Tensor) -> Tensor:
        """Put on ``y`` the factor that embeddings such as Gemma's have for what they look up."""
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class BlockView(WeightlessView):
    """A feed-forward block: a module of linear layers that maps features to features of the same width."""

    kind = "block"
    called = "block"

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(module, path, **settings)
        views = [view for child in _linear_children(module) if (view := _leaf_view(child, path))]
        self._first, self._last = views[0], views[-1]

    @property
    def d_in(self) -> int:
        return self._first.d_in

    @property
    def d_out(self) -> int:
        return self._last.d_out

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype


@dataclass(frozen=True)
class LayerKind:
    """One row of the table: which modules are of this kind, and how they are shown."""

    name: str
    matches: Callable[[nn.Module], bool]
    view: type[LayerView]
    linear: bool = False
    """Whether 'all-linear' takes it."""
    stands_for: str = ""
    """The kind whose operation it does with a weight in another format: what adapts that kind adapts this one."""

    def among(self, kinds: Sequence[str]) -> bool:
        """Whether what can adapt these kinds can adapt this one."""
        return self.name in kinds or self.stands_for in kinds


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


def _is_block(module: nn.Module) -> bool:
    linear = _linear_children(module)
    if len(linear) < 2 or any(list(child.children()) for child in module.children() if child not in linear):
        return False
    first, last = _leaf_view(linear[0], ""), _leaf_view(linear[-1], "")
    return first is not None and last is not None and first.d_in == last.d_out != first.d_out


def _linear_children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if (kind := _leaf_kind(child)) and kind.linear]


KINDS: tuple[LayerKind, ...] = (
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
    LayerKind("conv", lambda m: isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d), ConvView),
    LayerKind("embedding", _is_plain_embedding, EmbeddingView),
    LayerKind("norm", is_norm, NormView),
    LayerKind("attention", is_attention, AttentionView),
    LayerKind("block", _is_block, BlockView),
    LayerKind("transformer", is_transformer, TransformerView),
    LayerKind("transformer-block", is_transformer_block, TransformerBlockView),
)
"""Every kind of layer that can be adapted; the first row that matches a module is its kind."""


def _leaf_kind(module: nn.Module) -> LayerKind | None:
    return next(
        (k for k in KINDS if k.name not in ("block", "attention", "transformer") and k.matches(module)), None
    )


def _leaf_view(module: nn.Module, path: str) -> LayerView | None:
    kind = _leaf_kind(module)
    return kind.view(module, path) if kind and kind.linear else None


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the module's kind, or None where it cannot be adapted.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3)).name
        'conv'
    """
    state = getattr(module, "_addenda", None)
    if state is not None:  # adapters inside must not change what the layer is
        return next(k for k in KINDS if k.name == state.view.kind)
    return next((k for k in KINDS if k.matches(module)), None)


def view_of(module: nn.Module, path: str, **settings: Any) -> LayerView:
    """Return the module as a method sees it.

    Args:
        module: a layer.
        path: where it is in its model.
        settings: how an adapter's tensors are made on it, as for `addenda.core.contract.Base`.

    Raises:
        MethodError: the module is of no known kind.
    """
    kind = kind_of(module)
    if kind is None:
        raise MethodError(
            f"'{path}' is a {type(module).__name__}, which is of no known layer kind",
            where={"kinds": " ".join(k.name for k in KINDS)},
            hint="a new kind is one class and one row in addenda/core/layers.py",
        )
    return kind.view(module, path, **settings)
