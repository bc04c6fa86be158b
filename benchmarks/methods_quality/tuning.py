"""The learning rate of a method, tuned over a grid that is the same for all: half decades, 3e-4, 1e-3, 3e-3 and so on.

The search begins beside the rate that the method itself names and goes on, a rung at a time, until the best rate has a
worse one on either side. It goes by the loss rather than by accuracy: from too low a rate to the best one that falls
steadily, where accuracy stands still or jumps by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["best_rate", "next_rate"]

LOWEST, HIGHEST = 1e-6, 10.0


def next_rate(losses: Mapping[float, float], *, first: float) -> float | None:
    """Return the rate to try next, or None where the best one is known.

    Args:
        losses: what each rate gave, nan where the run failed.
        first: where to begin; the rate of the grid that is nearest is taken.
    """
    if not losses:
        return _beside(first, 0)
    best = best_rate(losses)
    around = (_beside(min(losses), -1),) if best is None else (_beside(best, 1), _beside(best, -1))
    return next((rate for rate in around if rate not in losses and LOWEST <= rate <= HIGHEST), None)


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Return the rate with the lowest loss, the lower one where two share it; None where every run failed."""
    able = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(sorted(able), key=able.__getitem__) if able else None


def _beside(rate: float, steps: int) -> float:
    """The rate of the grid so many half decades above the one nearest to ``rate``, exactly as it is written."""
    rung = round(2 * math.log10(rate)) + steps
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")
