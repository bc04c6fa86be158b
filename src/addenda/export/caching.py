"""What stands against reading a sequence in pieces, as programs with a key-value cache do."""

from __future__ import annotations

from addenda.core.planning import Plan

__all__ = ["against_cache"]


def against_cache(planned: Plan) -> str:
    """Return what an adapter does with a sequence as a whole; empty where each token is treated by itself."""
    method = planned.method
    if any(row.kind == "transformer" for row in planned.rows):
        return "acts on a sequence as a whole"
    if method.reads_tokens() or method.looks_ahead():
        return "acts by what was read before"
    return "averages over a sequence" if "rows" in method.exceptions else ""
