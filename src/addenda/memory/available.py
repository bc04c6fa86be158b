"""How much memory this process may still take: what the machine has free, or its container where that is less."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

__all__ = ["available_memory"]

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def available_memory(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUP) -> int:
    """Return the bytes that can be taken without swapping and without passing a limit of this process's container.

    Args:
        groups: where the control groups (version 2) are.
        own: the file that names the group of this process.

    Example:
        >>> 0 <= available_memory() <= psutil.virtual_memory().total
        True
    """
    return min(psutil.virtual_memory().available, _left_by_groups(groups, own))


def _left_by_groups(groups: Path, own: Path) -> int:
    """The least that the process's control group and those around it leave; endless where none has a limit."""
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        name = "/"
    group = groups / name.strip("/")
    inner = [group, *group.parents] if group.is_relative_to(groups) else [groups]
    return min(_left(folder) for folder in inner if folder.is_relative_to(groups))


def _left(group: Path) -> int:
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group here, or "max"
        return sys.maxsize
    return max(0, limit - used + _droppable(group))


def _droppable(group: Path) -> int:
    """Bytes of files that were read and can be forgotten; they count as used."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, StopIteration):
        return 0
