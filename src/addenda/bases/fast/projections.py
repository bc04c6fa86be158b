"""Linear layers that read one tensor (queries, keys and values most of all) as one node: `addenda.core.sharing`.

Which layers of a module these are is seen while it runs. All else of the module stays its own, attention included: it
is handed each layer's output in the place where it calls the layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from addenda.bases.fast.fusion import Fusion, forward_replaced, linear_layers, near, probe, quietly
from addenda.bases.fast.self_attention import arguments_of
from addenda.core.sharing import shared_linear, term_of

__all__ = ["projections"]

KIND = "projections of one input"


def projections(module: nn.Module, like: Tensor) -> Fusion | None:
    """Recognise two or more linear layers right inside a module that are called with the module's own input."""
    layers = linear_layers(module)
    if len(layers) < 2:
        return None
    x = probe(like, 1, 6, layers[0].in_features)
    for arguments in arguments_of(module, x):
        with _fed(layers, x) as fed:
            answer = quietly(module, x, **arguments)
        if answer is None or len(fed) < 2:
            continue
        forward = _lean(module, fed)
        if near(_first(quietly(forward, x, **arguments)), _first(answer), units=256):
            return Fusion(KIND, module, type(module), forward)
    return None


def _first(answer: Any) -> Any:
    return answer[0] if isinstance(answer, tuple) else answer


@contextmanager
def _fed(layers: Sequence[nn.Module], x: Tensor) -> Iterator[list[nn.Module]]:
    """Note which of the layers are called with ``x`` itself within the block."""
    fed: list[nn.Module] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and arguments[0] is x and layer not in fed:
            fed.append(layer)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield fed
    finally:
        for handle in handles:
            handle.remove()


def _lean(module: nn.Module, layers: Sequence[nn.Module]) -> Callable[..., Any]:
    own = type(module).forward
    _, name, *_ = (*inspect.signature(own).parameters, "")

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(name)
        if not isinstance(x, Tensor) or any(term_of(layer, x) is None for layer in layers):
            return own(module, *args, **kwargs)
        with ExitStack() as stack:
            for layer, y in zip(layers, shared_linear(layers, x), strict=True):
                stack.enter_context(forward_replaced(layer, _handing(layer, x, y)))
            return own(module, *args, **kwargs)

    return forward


def _handing(layer: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The layer's forward while ``y`` is known to be what it gives for ``x``."""

    def forward(given: Tensor) -> Tensor:
        out: Tensor = y if given is x else type(layer).forward(layer, given)
        return out

    return forward
