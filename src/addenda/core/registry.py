"""The registry of methods: one decorator, and the names it has seen."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from addenda.errors import MethodError, NotFoundError, nearest

if TYPE_CHECKING:
    from addenda.core.contract import Method

__all__ = ["ENTRY_POINT_GROUP", "get", "names", "register"]

ENTRY_POINT_GROUP = "addenda.methods"
"""Outside packages list the modules that register their methods under this entry-point group."""

_METHODS: dict[str, type[Method]] = {}
_discovered = False

M = TypeVar("M", bound="type[Method]")


def register(name: str) -> Callable[[M], M]:
    """Register a method class under ``name``; a taken name is an error.

    Raises:
        MethodError: another class has the name.
    """

    def decorate(cls: M) -> M:
        taken = _METHODS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise MethodError(
                f"method name '{name}' is taken by {taken.__module__}.{taken.__qualname__}",
                hint="register under another name",
            )
        cls.name = name
        _METHODS[name] = cls
        return cls

    return decorate


def names() -> list[str]:
    """Return the names of all methods, sorted."""
    _discover()
    return sorted(_METHODS)


def get(name: str) -> type[Method]:
    """Return the method class registered under ``name``.

    Raises:
        NotFoundError: there is none.

    Example:
        >>> get("lora").__name__
        'LoRA'
    """
    _discover()
    if name not in _METHODS:
        close = nearest(name, _METHODS)
        raise NotFoundError(
            f"no method is called '{name}'",
            where={"methods": " ".join(names())},
            hint=f"did you mean '{close[0]}'?" if close else "see 'addenda methods'",
        )
    return _METHODS[name]


def _discover() -> None:
    """Load every module of the methods room and of outside packages once; loading is what registers them."""
    global _discovered
    if _discovered:
        return
    room = importlib.import_module("addenda.methods")
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"addenda.methods.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()
    _discovered = True
