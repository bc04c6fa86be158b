"""The form of a data check, and the registry of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from addenda.data.findings import Severity
from addenda.data.problem import Problem
from addenda.errors import ConfigError

__all__ = ["CHECKS", "Check", "Stage", "register"]

Stage = Literal["file", "bytes", "record", "turns", "encode"]


class Check:
    """One thing that can be wrong with training data.

    A subclass has a docstring with the sections *What it finds*, *Why it matters*, *Example* and
    *What to do*, a ``bad`` and a ``good`` file, and ``find``, which yields a `Problem` for each place.
    ``find`` takes what its stage examines: the bytes of a row, the parsed row, or its turns.
    """

    code: ClassVar[str]
    severity: ClassVar[Severity]
    stage: ClassVar[Stage]
    fix: ClassVar[str]
    """What to do, one line."""
    bad: ClassVar[bytes | Mapping[str, bytes]]
    """A file on which it fires (a mapping is a folder of files)."""
    good: ClassVar[bytes | Mapping[str, bytes]]
    """A file on which neither it nor any error fires."""
    file_name: ClassVar[str] = "data.jsonl"
    """What the examples are called, where the name matters."""

    @classmethod
    def find(cls, subject: Any) -> Iterator[Problem]:
        """Yield what is wrong with a subject. The reader and the encoder raise the checks of files and encoded rows
        themselves, where the fact is known; those keep this."""
        return iter(())

    @classmethod
    def problem(cls, found: str, **details: Any) -> Problem:
        """Make a `Problem` of this check's code."""
        return Problem(cls.code, found, **details)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


CHECKS: dict[str, type[Check]] = {}
"""All checks by code, in the order in which they were registered."""

_C = TypeVar("_C", bound=type[Check])


def register(check: _C) -> _C:
    """Put a check into the registry; a taken code is an error."""
    if check.code in CHECKS:
        raise ConfigError(
            f"data check '{check.code}' is registered twice", hint="give the check another code"
        )
    CHECKS[check.code] = check
    return check
