"""Find the modules that have a leaner form, and lend it to them for the length of a ``with`` block.

A module's class, parameters and hooks stay. Layers inside it run their adapters as they would: a fused form either
calls the layer as the module it is, or does all that the layer and its one low-rank adapter do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fusion", "Unproven", "forward_replaced", "fused_on", "linear_layers", "near", "probe", "quietly"]


@dataclass(frozen=True)
class Fusion:
    """One module and its lean forward."""

    kind: str
    """``RMS norm``, ``gated MLP`` and so on."""
    module: nn.Module
    """The module, as it is in the model."""
    original: type[nn.Module]
    """Its class when it was proven; under another class (an adapter's host) it is left alone."""
    forward: Callable[..., Any]
    """What it runs instead of its own forward."""
    covers: tuple[nn.Module, ...] = ()
    """Modules inside it that it does not call: there a lean form would never run."""


@dataclass(frozen=True)
class Unproven:
    """One module that holds what a known part holds, and why it runs as it is all the same."""

    kind: str
    module: nn.Module
    reason: str


@contextmanager
def fused_on(fusions: Sequence[Fusion]) -> Iterator[None]:
    """Run the lean forwards within the block."""
    with ExitStack() as stack:
        for fusion in fusions:
            if type(fusion.module) is fusion.original and "forward" not in vars(fusion.module):
                stack.enter_context(forward_replaced(fusion.module, _lent(fusion)))
        yield


def _lent(fusion: Fusion) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if type(fusion.module) is fusion.original:
            return fusion.forward(*args, **kwargs)
        return type(fusion.module).forward(fusion.module, *args, **kwargs)  # an adapter has come since

    return forward


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let this one module run `forward` within the block; its class is not touched."""
    former = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if former is not None:
            vars(module)["forward"] = former


# ------------------------------------------------------------------------------------------------------------- proof


def linear_layers(module: nn.Module) -> list[Any]:
    """The layers right inside a module that are linear, or say so: of any class and any weight format."""
    return [layer for layer in module.children() if hasattr(layer, "in_features")]


def probe(like: Tensor, *shape: int) -> Tensor:
    """Random numbers, the same on every call, in the dtype and on the device of `like`."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return made.to(like.dtype).to(like.device)


def quietly(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The answer of a module that may not be what it looks like; None where it cannot take these arguments."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments, **named)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError):
        return None


def near(x: Any, y: Any, *, units: float = 4) -> bool:
    """Equal but for some of the last bits of the dtype, where fp32 counts as the most exact: norms run in it in any.

    What a product adds up may cancel, so an element is measured by the largest beside it in its row.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
        return False
    eps = units * max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    x, y = x.double(), y.double()
    return bool(((x - y).abs() <= eps * y.abs().amax(-1, keepdim=True)).all())
