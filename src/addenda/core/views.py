"""How a layer is shown to a method: what all views share, and the view of a linear layer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core import parts
from addenda.core.changed import changed_linear
from addenda.core.contract import Adapter, Base
from addenda.core.lowrank import low_rank_linear
from addenda.core.terms import Addend, Term, linear_with_terms
from addenda.memory.arena import product

__all__ = ["CompressedView", "LayerView", "LinearView", "PartView", "autocast_on"]


def autocast_on(x: Tensor) -> bool:
    """Whether operations on ``x`` are cast as they run; never on a device that knows no autocast.

    Example:
        >>> autocast_on(torch.ones(2)), autocast_on(torch.ones(2, device="meta"))
        (False, False)
    """
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class LayerView(Base):
    """A layer, read through the eyes of a method; the only code that knows where the layer keeps what."""

    input_name: str = "input"
    """What the layer's forward calls its first argument."""
    writable: ClassVar[bool] = True
    """Whether a merge may write the layer's weight."""
    folded: ClassVar[bool] = False
    """Whether the layer is never called: its weight is read, so an adapter acts by what it folds into alone."""

    def __init__(self, module: nn.Module, path: str, **settings: Any):
        super().__init__(**settings)
        self.module: Any = module
        self.path = path
        self.original: Any = getattr(type(module), "original_class", type(module))
        self.args: tuple[object, ...] = ()
        self.kwargs: dict[str, object] = {}

    def received(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, LayerView]:
        """Return a call's input, and the layer as it is called with everything else that was given."""
        x, *rest = args if args else (kwargs.pop(self.input_name),)
        if not rest and not kwargs:
            return x, self
        bound = copy.copy(self)
        bound.args, bound.kwargs = tuple(rest), kwargs
        return x, bound

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.original.forward(self.module, x, *self.args, **self.kwargs)
        return y

    @property
    def d_in(self) -> int:
        return int(self.to_matrix(self.stored()).shape[1])

    @property
    def d_out(self) -> int:
        return int(self.to_matrix(self.stored()).shape[0])

    @property
    def channels_in(self) -> int | None:
        return self.d_in

    @property
    def channels_out(self) -> int:
        return self.d_out

    @property
    def device(self) -> torch.device:
        return self.stored().device

    @property
    def dtype(self) -> torch.dtype:
        return self.stored().dtype

    @property
    def others(self) -> Mapping[str, Adapter]:
        carries = hasattr(self.module, "_addenda")
        return cast(Mapping[str, Adapter], self.module.adapters) if carries else {}

    @property
    def has_bias(self) -> bool:
        return getattr(self.module, "bias", None) is not None

    def weight(self) -> Tensor:
        return self.to_matrix(self.stored().detach())

    def exact_weight(self) -> Tensor:
        """The weight, (d_out, d_in), in float32 at least, not rounded to the dtype the layer computes in; detached."""
        return self.weight().to(torch.promote_types(self.dtype, torch.float32))

    def bias(self) -> Tensor | None:
        return self.module.bias.detach() if self.has_bias else None

    @property
    def form(self) -> object:
        """What layers have in common for which `problems` is the same."""
        return self.original, type(getattr(self.module, "weight", None))

    def add_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if (
            not self.writable or self.module._parameters.get("weight") is None
        ):  # packed, or computed from others
            return super().add_weight(x, weight, bias)
        own = self.bias()
        if bias is not None:
            own = (bias if own is None else own + bias).to(self.dtype)
        return self.changed(x, weight, own)

    def changed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer as if ``weight`` were added to its own, and with this bias."""
        total = (self.weight() + weight).to(self.dtype)
        plain = self.original.forward in _PLAIN_FORWARDS
        return self.apply(x, total, bias) if plain else self.as_if(x, total, bias)

    def tied_to(self, other: Base) -> bool:
        held = self.module._parameters.get("weight")
        return (
            held is not None
            and isinstance(other, LayerView)
            and other.module._parameters.get("weight") is held
        )

    def as_if(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer's own forward as if it held this (d_out, d_in) weight and this bias."""
        held = {**self.module._parameters, "weight": self.from_matrix(weight)}
        if "bias" in held:
            held["bias"] = bias
        twin = object.__new__(self.original)
        vars(twin).update(vars(self.module), _parameters=held)
        y: Tensor = self.original.forward(twin, x, *self.args, **self.kwargs)
        return y

    def problems(self) -> list[str]:
        """Return why no adapter can be trained on the layer, one short sentence each."""
        return []

    def weight_place(self) -> parts.Place:
        """Where the weight is kept."""
        return parts.Place(self.module, "weight")

    def bias_place(self) -> parts.Place | None:
        """Where the bias is kept, or would be; None where there is no place for one."""
        return parts.Place(self.module, "bias")

    def is_plain(self) -> bool:
        """Whether the layer computes its kind's operation with its weight, and nothing more.

        A subclass may do more: an embedding that scales what it looks up, a linear layer with a norm. One that
        defines a forward of its own is tried on a small input.
        """
        if self.runs_plain_forward():
            return True
        with torch.no_grad():
            x = self.sample()
            try:
                y = self.original.forward(self.module, x)
            except TypeError:  # it asks for more than an input
                return False
            plain = self.apply(x, self.weight(), self.bias())
            same_form = isinstance(y, Tensor) and y.shape == plain.shape
            return same_form and not bool((y - plain).abs().max() > 0.01 * plain.abs().max())

    def runs_plain_forward(self) -> bool:
        """Whether the layer has the forward of PyTorch's own class."""
        return self.original.forward in _PLAIN_FORWARDS

    def sample(self) -> Tensor:
        """A small input."""
        return self._random(2, self.d_in)

    def _random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=generator).to(device=self.device, dtype=self.dtype)

    def stored(self) -> Tensor:
        """The weight as the layer keeps it."""
        weight: Tensor = self.module.weight
        return weight

    def to_matrix(self, stored: Tensor) -> Tensor:
        """A stored weight as (d_out, d_in)."""
        return stored

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A (d_out, d_in) matrix in the layout in which the layer stores its weight."""
        return matrix


_PLAIN_FORWARDS = (
    nn.Linear.forward,
    nn.Embedding.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
    nn.ConvTranspose1d.forward,
    nn.ConvTranspose2d.forward,
    nn.ConvTranspose3d.forward,
)


class LinearView(LayerView):
    """``nn.Linear``: weight (d_out, d_in)."""

    kind = "linear"

    @property
    def pointwise(self) -> bool:
        return True

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    def linear(self, x: Tensor) -> Tensor:
        """x: (n, d_in) -> (n, d_out), bias added."""
        return product(x, self.stored().t(), self.module.bias)

    def grad_input(self, g: Tensor) -> Tensor:
        """g: (n, d_out) -> (n, d_in)."""
        return product(g, self.stored())

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        """Add the gradient of the input to ``total``: (n, d_in), in place."""
        return total.addmm_(g, self.stored())

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        if self.fusible(x):
            return low_rank_linear(x, A, B, scaling=scaling, base=self)
        return super().add_low_rank(x, A, B, scaling)

    def add_low_ranks(self, x: Tensor, parts: Sequence[Addend]) -> Tensor | None:
        return linear_with_terms(x, [Term(self, tuple(parts))])[0] if self.fusible(x) else None

    def changed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return changed_linear(x, weight, bias, self) if self.fusible(x) else super().changed(x, weight, bias)

    def fusible(self, x: Tensor) -> bool:
        """Whether the layer does for ``x`` the plain frozen product and nothing more."""
        # A compiler fuses the plain form itself and cannot look into the autograd function's view object.
        plain = x.dtype == self.dtype and not x.is_nested and not autocast_on(x)
        frozen = not any(p is not None and p.requires_grad for p in self.module._parameters.values())
        return plain and frozen and self._runs_the_plain_product() and not torch.compiler.is_compiling()

    def _runs_the_plain_product(self) -> bool:
        # A subclass of nn.Linear may do more than the product; then it is called as it is.
        return bool(self.original.forward is nn.Linear.forward)


class CompressedView(LinearView):
    """A linear layer that keeps its weight otherwise than as one matrix of numbers, so that none can be folded in."""

    writable = False

    @property
    def d_in(self) -> int:
        return int(self.module.in_features)

    @property
    def d_out(self) -> int:
        return int(self.module.out_features)

    @property
    def device(self) -> torch.device:
        own = itertools.chain(self.module.parameters(recurse=False), self.module.buffers(recurse=False))
        first: Tensor = next(own)
        return first.device

    def mapped(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.original.forward(self.module, rows.to(self.dtype))
            bias = self.bias()
            return y if bias is None else y - bias.to(y.dtype)


class PartView(LinearView):
    """One of the weights that a module holds, seen as a linear layer."""

    module: parts.Part

    @property
    def form(self) -> object:
        owner = type(self.module.owner)
        return self.kind, getattr(owner, "original_class", owner), type(self.weight_place().parameter)

    @property
    def bias_possible(self) -> bool:
        return self.has_bias or not self.folded

    def weight_place(self) -> parts.Place:
        return self.module.weight_at

    def bias_place(self) -> parts.Place | None:
        return self.module.bias_at

    def fusible(self, x: Tensor) -> bool:
        return super().fusible(x) and not self.stored().requires_grad
