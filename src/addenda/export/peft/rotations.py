"""How PEFT says by what a rotation is computed: solved for, or by a series of so many terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addenda.errors import CheckpointError

__all__ = ["exact_and_terms", "series_problems"]


def exact_and_terms(config: Mapping[str, Any]) -> tuple[bool, int]:
    """Return whether the rotation is solved for, and otherwise the terms of its series.

    Example:
        >>> exact_and_terms({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3})
        (False, 4)

    Raises:
        CheckpointError: so few terms are no rotation.
    """
    exact, terms = not config.get("use_cayley_neumann"), config.get("num_cayley_neumann_terms", 5)
    if not exact and terms < 3:
        raise CheckpointError(
            f"num_cayley_neumann_terms = {terms} makes no rotation in PEFT",
            hint="a series of three terms and more is read",
        )
    return exact, 5 if exact else max(terms, 4)  # for three terms PEFT sums four


def series_problems(terms: int) -> list[str]:
    """Return why PEFT cannot compute a rotation by a series of so many terms."""
    return [] if terms >= 4 else [f"PEFT has no series of {terms} terms, only of four and more"]
