"""The model as it is traced: the adapter in its weights where it has such a form, packed weights unpacked, finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from addenda.bases.packed_layers import PackedEmbedding, PackedLinear, packed_layers
from addenda.core.handle import Handle
from addenda.errors import ExportError, MethodError
from addenda.export.probes import named_output

__all__ = ["Positional", "folded", "require_finite"]


class Positional(nn.Module):
    """A model whose inputs are given in order, and which returns the one tensor that is asked for."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.eval()  # or the exporter puts the model inside into training mode as well

    def forward(self, *values: Tensor) -> Tensor:
        """Run the model on its inputs in the order of the names."""
        return named_output(self.model(**dict(zip(self.names, values, strict=True))))[1]


@contextlib.contextmanager
def folded(handle: Handle) -> Iterator[None]:
    """Let the model compute with the adapter in its weights, for the length of a block.

    Where the adapter has no such form, or a weight is shared with another layer, it runs as it did in training. The
    model is left as it was, bit for bit.

    Raises:
        ExportError: packed weights have to be unpacked, and the adapter cannot be folded into them.
    """
    if layers := packed_layers(handle.model):
        with _unpacked(handle, layers):
            yield
        return
    try:
        handle.merge()
    except MethodError:
        yield
        return
    try:
        yield
    finally:
        handle.unmerge()


@contextlib.contextmanager
def _unpacked(handle: Handle, layers: dict[str, PackedLinear | PackedEmbedding]) -> Iterator[None]:
    """Put dense layers in the place of packed ones, those that the adapter stands on with it folded in."""
    if other := [path for path in handle.paths if path not in layers]:
        raise ExportError(
            f"'{other[0]}' is adapted in a model whose weights are packed elsewhere",
            where={"layers": len(other)},
            hint="load the base with weights='dense' and the adapter onto it",
        )
    made: dict[int, nn.Parameter] = {}
    try:
        for path, layer in layers.items():
            handle.model.set_submodule(path, _dense(layer, *_values(handle, path, layer, made)))
        yield
    finally:
        for path, layer in layers.items():
            handle.model.set_submodule(path, layer)


def require_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        ExportError: some are; names them.
    """
    wrong = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if wrong:
        raise ExportError(
            f"'{wrong[0]}' holds values that are not finite",
            where={"tensors": len(wrong)},
            hint="the training went wrong, or the file it was loaded from is damaged; nothing was written",
        )


def _values(
    handle: Handle, path: str, layer: PackedLinear | PackedEmbedding, made: dict[int, nn.Parameter]
) -> tuple[nn.Parameter, Tensor | None]:
    """Return weight and bias; layers without an adapter that share their bytes go on sharing their weight."""
    if path in handle.paths:
        weight, bias = handle.folded(path)
        return nn.Parameter(weight, requires_grad=False), bias
    place = layer.raw.data_ptr()
    if place not in made:
        made[place] = nn.Parameter(layer.dequantized(), requires_grad=False)
    return made[place], getattr(layer, "bias", None)


class _Embedding(nn.Embedding):
    """An embedding whose rows are scaled as they are looked up."""

    def __init__(self, rows: int, columns: int, scale: float | None) -> None:
        super().__init__(rows, columns)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        return found if self.scale is None else found * self.scale


def _dense(layer: nn.Module, weight: nn.Parameter, bias: Tensor | None) -> nn.Module:
    rows, columns = weight.shape
    with torch.device("meta"):  # its values come with the weight
        if isinstance(layer, PackedEmbedding):
            dense: nn.Module = _Embedding(rows, columns, layer.scale)
        else:
            dense = nn.Linear(columns, rows, bias=bias is not None)
    dense.register_parameter("weight", weight)
    if bias is not None:
        dense.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))
    return dense.eval()
