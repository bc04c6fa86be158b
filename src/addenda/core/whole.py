"""Layers trained whole: a change of every number of a weight and its bias, beside a base that stays as it is.

Any method takes some along by its setting ``whole``: a head, an embedding, norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.layers import LayerKind
from addenda.core.parts import Part
from addenda.core.targets import adaptable, bypass_of, exact, matches

__all__ = [
    "WHOLE_KINDS",
    "WholeAdapter",
    "exact_layers",
    "is_whole",
    "whole_adapter",
    "whole_layers",
    "whole_problems",
]

WHOLE_KINDS = ("linear", "conv1d-transposed", "conv", "embedding", "norm")
"""Kinds of layers that have a weight and can be trained whole."""


class WholeAdapter(Adapter):
    """weight: (d_out, d_in), or (d_in, d_out) of a layer that looks its columns up; bias: (d_out,) or None."""

    additive = True

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, looked_up: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.looked_up = weight, bias, looked_up

    def matrix(self) -> Tensor:
        """Return the change of the weight, (d_out, d_in)."""
        return self.weight.t() if self.looked_up else self.weight

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.add_weight(x, self.matrix(), self.bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.bias is None or bias is None:
            return weight + self.matrix().to(weight.dtype), bias
        return weight + self.matrix().to(weight.dtype), bias + self.bias.to(weight.dtype)


def whole_adapter(base: Base, *, with_bias: bool = True) -> WholeAdapter:
    """Make the adapter that changes every number of a layer; it starts at zero."""
    looked_up = base.channels_in is None
    weight = base.parameter(*((base.d_in, base.d_out) if looked_up else (base.d_out, base.d_in)))
    bias = base.parameter(base.d_out) if with_bias and base.has_bias else None
    return WholeAdapter(weight, bias, looked_up=looked_up)


def is_whole(method: Method, path: str) -> bool:
    """Whether the method's setting ``whole`` names the layer at ``path``, or a module around it."""
    return any(matches(around, suffix) for suffix in method.whole for around in _around(path))


def _around(path: str) -> Iterator[str]:
    """The path itself, and those of the modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def whole_layers(model: nn.Module, method: Method) -> dict[str, nn.Module]:
    """Return the layers that the method trains whole, by path, in the model's order."""
    if not method.whole:
        return {}
    return {
        path: module
        for path, (module, kind) in adaptable(model).items()
        if kind.among(WHOLE_KINDS) and is_whole(method, path)
    }


def whole_problems(model: nn.Module, method: Method) -> list[str]:
    """Return which entries of ``whole`` name nothing, and which parameters they name that are in no known layer."""
    layers = whole_layers(model, method)
    named = [around for path in layers for around in _around(path)]
    found = [
        f"whole names no layer by '{suffix}'"
        for suffix in method.whole
        if not any(matches(around, suffix) for around in named)
    ]
    found += [
        f"'{path}' is read by {bypass_of(model, path, layer)} without being called"
        for path, layer in layers.items()
        if bypass_of(model, path, layer)
    ]
    if method.whole:
        held = {id(parameter) for layer in layers.values() for parameter in _held(layer)}
        found += [
            f"whole names '{name}', which belongs to no layer of a kind that can be trained whole"
            for name, parameter in model.named_parameters()
            if is_whole(method, name) and id(parameter) not in held
        ]
    return found


def _held(layer: nn.Module) -> list[Tensor | None]:
    """The parameters in which a layer keeps what it computes with; those of a part are its owner's."""
    places = [layer.weight_at, layer.bias_at] if isinstance(layer, Part) else []
    return [*layer.parameters(), *(place.parameter for place in places if place is not None)]


def _why_not_whole(kind: LayerKind) -> str | None:
    return None if kind.among(WHOLE_KINDS) else f"no layer of kind '{kind.name}' is trained whole"


def exact_layers(
    model: nn.Module,
    method: Method,
    paths: Sequence[str],
    *,
    why_not: Callable[[LayerKind], str | None] | None = None,
) -> dict[str, nn.Module]:
    """Return the layers at exactly these paths, those that are trained whole too, in the model's order.

    Those that are not are of kinds that ``why_not`` says nothing against; None means all that the method can adapt.

    Raises:
        TargetError: a path is no layer of a kind that the method adapts, or that can be trained whole.
    """
    whole = [path for path in paths if is_whole(method, path)]
    others = [path for path in paths if not is_whole(method, path)]
    found = {
        **(exact(model, whole, _why_not_whole) if whole else {}),
        **exact(model, others, why_not or (lambda kind: kind.why_not(method))),
    }
    return {path: found[path] for path in adaptable(model) if path in found}
