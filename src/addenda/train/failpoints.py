"""Named places where a test can make the run die or the disk fail; free of effect unless asked for.

``ADDENDA_FAILPOINTS="name=action[@n],..."`` makes the n-th passage (default: the first) of the place ``name`` do
``action``: ``kill`` ends the process at once as a power cut would, ``enospc`` and ``eio`` raise the OSError that a
full or broken disk raises. An unknown name or action is an error, so that no test can aim beside its target.
"""

from __future__ import annotations

import errno
import os
import signal

from addenda.errors import ConfigError, nearest

__all__ = ["FAILPOINTS", "failpoint"]

FAILPOINTS = (
    "step.before_update",
    "step.after_update",
    "evaluate",
    "checkpoint.begin",
    "checkpoint.write",
    "checkpoint.fsync",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.rotate",
    "checkpoint.rotated",
    "finish",
)
_VARIABLE = "ADDENDA_FAILPOINTS"
_ACTIONS = ("kill", "enospc", "eio")
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Pass the place ``name``; fail here if the environment says so.

    Raises:
        OSError: the environment asks for a full or broken disk here.
        ConfigError: the environment names an unknown place or action.
    """
    wish = os.environ.get(_VARIABLE)
    if not wish:
        return
    _passed[name] = _passed.get(name, 0) + 1
    for item in wish.split(","):
        place, action, count = _parse(item)
        if place == name and _passed[name] == count:
            _fail(name, action)


def _parse(item: str) -> tuple[str, str, int]:
    place, _, rest = item.strip().partition("=")
    action, _, count = rest.partition("@")
    if place not in FAILPOINTS or action not in _ACTIONS or not (count or "1").isdigit():
        close = nearest(place, FAILPOINTS)
        raise ConfigError(
            f"cannot read '{item}' in {_VARIABLE}",
            where={"actions": " ".join(_ACTIONS)},
            hint=f"the nearest place is '{close[0]}'" if close else f"places: {' '.join(FAILPOINTS)}",
        )
    return place, action, int(count or 1)


def _fail(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    number = errno.ENOSPC if action == "enospc" else errno.EIO
    raise OSError(number, os.strerror(number), name)
