"""Checks of single settings; each returns the problems it finds, so that all can be reported together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

__all__ = ["flag", "integer", "number", "one_of", "suffixes", "table"]


def flag(name: str, value: object) -> list[str]:
    """Check that ``value`` is True or False.

    Example:
        >>> flag("create", "no")
        ["create must be True or False, got 'no'"]
    """
    return [] if isinstance(value, bool) else [f"{name} must be True or False, got {value!r}"]


def suffixes(name: str, value: object) -> list[str]:
    """Check that ``value`` is a list of texts, none of them empty.

    Example:
        >>> suffixes("feed_forward", "down_proj")
        ["feed_forward must be a list of texts, none of them empty, got 'down_proj'"]
    """
    if isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value):
        return []
    return [f"{name} must be a list of texts, none of them empty, got {value!r}"]


def table(name: str, value: object, check: Callable[[str, object], list[str]]) -> list[str]:
    """Check that ``value`` maps suffixes to settings that ``check`` finds right.

    Example:
        >>> table("ranks", {"down_proj": 0}, integer)
        ["ranks['down_proj'] must be a whole number >= 1, got 0"]
    """
    if not isinstance(value, Mapping):
        return [f"{name} must map suffixes to numbers, got {value!r}"]
    found = suffixes(f"keys of {name}", list(value))
    return found + [each for key, entry in value.items() for each in check(f"{name}[{key!r}]", entry)]


def one_of(name: str, value: object, known: tuple[str, ...]) -> list[str]:
    """Check that ``value`` is one of the words ``known``.

    Example:
        >>> one_of("mode", "bad", ("bat", "mini"))
        ["mode must be one of bat, mini, got 'bad'"]
    """
    good = isinstance(value, str) and value in known
    return [] if good else [f"{name} must be one of {', '.join(known)}, got {value!r}"]


LARGEST = 2**63 - 1
"""Largest whole number that PyTorch, NumPy and TOML all hold."""


def integer(name: str, value: object, *, least: int = 1) -> list[str]:
    """Check that ``value`` is a whole number of at least ``least``, and one that a machine word holds.

    Example:
        >>> integer("rank", 0)
        ['rank must be a whole number >= 1, got 0']
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return [f"{name} must be a whole number >= {least}, got {value!r}"]
    if value > LARGEST:
        return [f"{name} must be at most {LARGEST}, got {value!r}"]
    return []


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
) -> list[str]:
    """Check that ``value`` is a finite number with ``value > above``, ``value >= least`` and ``value < below``.

    Example:
        >>> number("alpha", float("nan"), above=0.0)
        ['alpha must be a finite number > 0, got nan']
    """
    limits = [
        f"{sign} {limit:g}"
        for sign, limit in ((">", above), (">=", least), ("<", below))
        if limit is not None
    ]
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value)
        <= sys.float_info.max  # neither infinite, nor NaN, nor a whole number beyond every float
        and (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
    )
    return (
        []
        if good
        else [f"{name} must be a finite number {' and '.join(limits)}, got {value!r}".replace("  ", " ")]
    )
