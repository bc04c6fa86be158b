"""The energy that the processor says it has used, where the machine tells it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["EnergyMeter"]

_COUNTERS = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules between two looks, from the processor packages' own counters (Intel and AMD on Linux).

    Args:
        folder: where the kernel shows its counters.

    Example:
        >>> EnergyMeter(Path("/nowhere")).watts() is None
        True
    """

    def __init__(self, folder: Path = _COUNTERS) -> None:
        self._folder = folder
        self._began, self._at_first = time.monotonic(), dict(self._read())

    def watts(self) -> float | None:
        """Return the mean power since the meter was made, in watts; None where no counter can be read."""
        now, seconds = dict(self._read()), time.monotonic() - self._began
        if not now or now.keys() != self._at_first.keys() or seconds <= 0:
            return None
        used = sum(self._used(package, before, now[package]) for package, before in self._at_first.items())
        return used / 1e6 / seconds

    def _read(self) -> Iterator[tuple[Path, int]]:
        """Every package's counter, in microjoules; the parts within a package (``:0:0``) are in its own already."""
        for package in sorted(self._folder.glob("*-rapl:*")):
            if package.name.count(":") == 1:
                try:
                    yield package, int((package / "energy_uj").read_text())
                except (OSError, ValueError):  # since 2020 only for the administrator, on most systems
                    continue

    @staticmethod
    def _used(package: Path, before: int, now: int) -> int:
        if now >= before:
            return now - before
        return now - before + int((package / "max_energy_range_uj").read_text())  # it went round once
