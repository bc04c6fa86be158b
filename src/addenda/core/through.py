"""Training through a rounding: a layer computes with the weight that a low-bit file will hold after a merge.

The forward folds the adapter into the weight, rounds the sum to the format and uses what is read back; the gradient
takes the rounding for the identity (a straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). For a low-rank
update that is the gradient it has without a rounding, but for the input's, which comes from the rounded weight: nothing
dense is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from addenda.core.composition import bare_of
from addenda.core.contract import Adapter, Base, Method
from addenda.core.foreign import QuantizedView
from addenda.core.merging import tied
from addenda.core.parts import adapted_class
from addenda.core.terms import Addend, Term, linear_with_terms
from addenda.core.views import LayerView, LinearView
from addenda.errors import MethodError
from addenda.memory.arena import empty, product

if TYPE_CHECKING:
    from addenda.core.handle import Handle

__all__ = ["Rounding", "Through", "merged_rows", "require_roundable", "rounding_of", "train_through"]


class Rounding(Protocol):
    """A packed format, as far as training through it goes."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def block(self) -> int | None:
        """Weights in a block; None where a row is one."""

    def quantize(self, weight: Tensor) -> Tensor:
        """(rows, d_in) -> raw rows, (rows, bytes) uint8."""

    def dequantize(self, raw: Tensor, d_in: int, out: Tensor | None = None) -> Tensor:
        """Raw rows -> (rows, d_in), written to ``out`` where that is given, else in float32."""


def _formats() -> Any:
    # The formats are of a room above; they are looked up by name, as methods are.
    return importlib.import_module("addenda.bases.formats")


def rounding_of(name: str) -> Rounding:
    """Return a packed format by its name, in capitals or not.

    Raises:
        NotFoundError: there is none.

    Example:
        >>> rounding_of("q4_1").name
        'Q4_1'
    """
    return cast(Rounding, _formats().get(str(name).upper()))


class Rounded:
    """A frozen linear layer on raw rows, unpacked whole for each product."""

    def __init__(self, raw: Tensor, rounding: Rounding, d_in: int, bias: Tensor | None) -> None:
        self.raw, self.rounding, self.d_in, self.bias = raw, rounding, d_in, bias

    def weight(self, like: Tensor) -> Tensor:
        """The weight, (d_out, d_in), in the dtype of ``like``."""
        return self.rounding.dequantize(self.raw, self.d_in, empty((len(self.raw), self.d_in), like))

    def linear(self, x: Tensor) -> Tensor:
        """x: (n, d_in) -> W x + b: (n, d_out)."""
        return product(x, self.weight(x).t(), self.bias)

    def grad_input(self, g: Tensor) -> Tensor:
        """g: (n, d_out) -> Wᵀ g: (n, d_in)."""
        return product(g, self.weight(g))

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        """Add Wᵀ g to ``total`` (n, d_in) in place, and return it."""
        return total.addmm_(g, self.weight(g))


class Through(Adapter):
    """Mixed in before an adapter's own class: all that it computes, folds and answers has gone through the rounding.

    Beside other adapters it changes the layer's output by what it changes of the bare layer's.
    """

    original_class: type[Adapter]
    rounding: Rounding
    reads_weight = True
    _last: tuple[object, Rounded] | None = None

    @property
    def unrounded(self) -> Adapter:
        """The same adapter, tensors and all, as it is without the rounding."""
        twin = object.__new__(self.original_class)
        object.__setattr__(twin, "__dict__", self.__dict__)
        return twin

    def low_rank_term(self) -> None:
        """None: what the layer computes is no sum with a low-rank term."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Return what the layer gives for ``x`` with the rounded weight; shapes as the layer's own."""
        bare = cast(LayerView, bare_of(base))
        term = self.term(bare, x)
        if term is not None:
            y = linear_with_terms(x, [term])[0]
        else:
            weight, bias = self.fold(bare.exact_weight(), bare.bias())
            y = bare.apply(x, weight.to(bare.dtype), None if bias is None else bias.to(bare.dtype))
        return y if bare is base else base(x) + (y - bare(x))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight that is read back from the rounded sum, and the bias; arguments as for any adapter."""
        folded, bias = self.unrounded.fold(weight, bias)
        return _StraightThrough.apply(folded, self.rounding), bias  # type: ignore[no-untyped-call]

    def rows(self, view: LayerView) -> Tensor:
        """Return the raw rows of the layer's weight with the adapter folded in, (d_out, bytes) uint8."""
        with torch.no_grad():
            return self.rounding.quantize(self.unrounded.fold(view.exact_weight(), view.bias())[0])

    def term(self, view: LayerView, x: Tensor, host: Any = None) -> Term | None:
        """Return what the layer computes for ``x`` as a term; None where that is no plain product or the update has no
        low rank."""
        factors = self.unrounded.low_rank_term()
        if factors is None or not isinstance(view, LinearView) or not view.fusible(x):
            return None
        return Term(self._rounded(view), (Addend(*factors),), host=host, within=True)

    def _rounded(self, view: LinearView) -> Rounded:
        """The rounded layer; where nothing is trained, the last one if no tensor was written to since."""
        if torch.is_grad_enabled():
            self._last = None
        else:
            tensors = [*self.parameters(), *self.buffers(), *view.module.parameters(recurse=False)]
            state = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
            if self._last is not None and self._last[0] == state:
                return self._last[1]
        made = Rounded(self.rows(view), self.rounding, view.d_in, view.bias())
        if not torch.is_grad_enabled():
            self._last = state, made
        return made


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounding: Rounding) -> Tensor:
        return rounding.dequantize(rounding.quantize(weight), weight.shape[1]).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def train_through(adapter: Adapter, rounding: Rounding) -> None:
    """Let an adapter compute through a rounding from now on."""
    adapter.__class__ = cast(type[Adapter], adapted_class(type(adapter), Through))
    cast(Through, adapter).rounding = rounding


def merged_rows(handle: Handle, path: str, name: str) -> Tensor:
    """Return a layer's weight with the adapter folded in as raw rows of a format, as a file holds them.

    An adapter that was trained through the format gives, to the bit, the weight that it was trained with; one that was
    trained through another format gives that weight rounded again.

    Args:
        handle: an attached adapter that is not merged.
        path: of one of its layers.
        name: of the format.

    Returns:
        (d_out, bytes of a row) uint8.

    Raises:
        MethodError: the adapter has no such weight.
        BaseModelError: a row is not whole blocks, or the folded weight is not finite.
    """
    adapter, view, rounding = handle.adapters[path], handle.view(path), rounding_of(name)
    if isinstance(adapter, Through) and adapter.rounding.name == rounding.name:
        return adapter.rows(view)
    with torch.no_grad():
        return rounding.quantize(adapter.fold(view.exact_weight(), view.bias())[0])


def require_roundable(
    model: nn.Module, method: Method, views: Mapping[str, LayerView], rounding: Rounding
) -> None:
    """Refuse to train through a rounding what could not be folded and rounded so afterwards.

    Raises:
        MethodError: all that stands against it, and the formats that fit where the width of the rows is in the way.
    """
    unfit = [view.d_in for view in views.values() if view.d_in % (rounding.block or 1)]
    found = [*_unfit_method(method), *_unfit_layers(model, views)]
    if unfit:
        found.append(
            f"rows of {min(unfit):,} weights are not whole blocks of {rounding.block} at {len(unfit)} of "
            f"{len(views)} layers"
        )
    if found:
        raise MethodError(
            f"cannot train through {rounding.name}: {'; '.join(found)}",
            where={"method": method.name, "layers": len(views)},
            hint=f"formats whose blocks fit all layers: {', '.join(_fitting(views))}"
            if unfit and len(found) == 1
            else "change the setting, leave such layers out of the targets, or train without 'through'",
        )


def _unfit_method(method: Method) -> list[str]:
    found = []
    if not method.mergeable:
        found.append(f"method '{method.name}' has no weight that could be folded in")
    if getattr(method, "dropout", 0):
        found.append("dropout has no place in a weight")
    if method.whole:
        found.append("layers that are trained whole are not rounded")
    return found


def _unfit_layers(model: nn.Module, views: Mapping[str, LayerView]) -> list[str]:
    kinds = {
        view.kind: path
        for path, view in views.items()
        if not view.pointwise or isinstance(view, QuantizedView)
    }
    more = [
        path
        for path, view in views.items()
        if view.kind not in kinds and view.writable and not view.stored().is_meta and not view.is_plain()
    ]
    shared = tied(model, {path: view for path, view in views.items() if view.writable})
    found = [f"'{path}' is of kind '{kind}'" for kind, path in kinds.items()]
    found += [f"'{path}' does more than apply its weight" for path in more[:1]]
    return found + [f"'{path}' shares its weight with '{other}'" for path, other in list(shared.items())[:1]]


def _fitting(views: Mapping[str, LayerView]) -> Sequence[str]:
    formats = _formats()
    widths = {view.d_in for view in views.values()}
    return [
        name
        for name in formats.names()
        if not any(width % (formats.get(name).block or 1) for width in widths)
    ]
