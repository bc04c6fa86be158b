"""Progress of a long step, reported by whoever works and shown by whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["OnProgress", "Progress"]


@dataclass(frozen=True)
class Progress:
    """How far one long step has come.

    Example:
        >>> Progress("download", done=1, total=4, unit="bytes").fraction
        0.25
    """

    task: str
    """What is being done, in a few words; one task is one bar."""
    done: float
    """Units finished so far."""
    total: float | None = None
    """Units in all, or None while unknown."""
    unit: str = ""
    """``bytes``, ``rows``, ``tokens``, ``steps``."""

    @property
    def fraction(self) -> float | None:
        """Share finished in [0, 1], or None while the total is unknown."""
        return None if not self.total else min(1.0, self.done / self.total)


OnProgress = Callable[[Progress], None]
"""A watcher: called from the working thread, must return quickly and raise nothing."""
