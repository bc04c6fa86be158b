"""JSON inside a string: arguments of a tool call, or a cell of a table that holds a list."""

from __future__ import annotations

from typing import Any

import orjson

from addenda.data.locate import MAX_DEPTH, nested_deeper

__all__ = ["parse_embedded"]


def parse_embedded(text: str) -> Any:
    """Parse it by the rules for rows: no NaN, no half characters, no deep nesting.

    Raises:
        ValueError: it is not JSON, or breaks one of these rules.

    Example:
        >>> parse_embedded('{"x": [1]}')
        {'x': [1]}
    """
    raw = text.encode("utf-8", "surrogatepass")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and nested_deeper(raw, MAX_DEPTH) is not None:
        raise ValueError(f"more than {MAX_DEPTH} levels deep")
    return orjson.loads(raw)
