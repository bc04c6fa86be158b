"""Building the adapters of one attach: what they share first, then one for each layer."""

from __future__ import annotations

from collections.abc import Mapping

from addenda.core.contract import Adapter, Base, Method

__all__ = ["build_adapters"]

COMMON = "common"
"""Name under which every adapter of an attach holds the module they share."""


def build_adapters(method: Method, bases: Mapping[str, Base]) -> dict[str, Adapter]:
    """Return an adapter for each layer, by path; all hold the same module as ``common``, where the method has one."""
    layers = list(bases.values())
    shared = method.build_common(layers, layers[0].source(COMMON)) if layers else None
    for base in layers:
        base.common = shared
    adapters = {path: method.build(base) for path, base in bases.items()}
    for adapter in adapters.values():
        adapter.common = shared
    return adapters
