"""Building the adapters of one attach: what they share first, then one for each layer."""

from __future__ import annotations

from collections.abc import Mapping

from addenda.core.contract import Adapter, Base, Method
from addenda.core.progress import OnProgress, Progress
from addenda.core.whole import is_whole, whole_adapter

__all__ = ["build_adapters"]

COMMON = "common"
"""Name under which every adapter of an attach holds the module they share."""


def build_adapters(
    method: Method, bases: Mapping[str, Base], *, on_progress: OnProgress | None = None
) -> dict[str, Adapter]:
    """Return an adapter for each layer, by path.

    The method's own all hold the same module as ``common``, where it has one; those of layers that are trained whole
    hold none.
    """
    own = {path: base for path, base in bases.items() if not is_whole(method, path)}
    layers = list(own.values())
    shared = method.build_common(layers, layers[0].source(COMMON)) if layers else None
    for base in layers:
        base.common = shared
    adapters: dict[str, Adapter] = {}
    for done, (path, base) in enumerate(bases.items(), start=1):
        adapters[path] = method.build(base) if path in own else whole_adapter(base)
        adapters[path].common = shared if path in own else None
        if on_progress is not None:
            on_progress(Progress("make adapters", done, len(bases), "layers"))
    return adapters
