"""What mlx-lm reads of a model's configuration that transformers keeps elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["rope_of", "with_rope"]

_OWN = ("rope_theta", "partial_rotary_factor")


def with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with its rotary embedding told at the top level too.

    Many of mlx-lm's models take the base of the rotation from ``rope_theta`` there, and without one silently compute
    with a default of their own.

    Example:
        >>> with_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})["rope_theta"]
        100000.0
    """
    return {**config, **rope_of(config)}


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding under the names that mlx-lm looks for; empty where there are none."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, Mapping):
        return {}
    everywhere = nested.get("full_attention", nested)
    made = {name: everywhere[name] for name in _OWN if name in everywhere}
    kind = everywhere.get("rope_type", "default")
    if kind != "default":
        rest = {name: value for name, value in everywhere.items() if name not in _OWN}
        made["rope_scaling"] = {**rest, "type": kind}
    sliding = nested.get("sliding_attention")
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        made["rope_local_base_freq"] = sliding["rope_theta"]
    return made
