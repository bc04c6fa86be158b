"""What an export format is: what it can hold, how it is written, and what runs it. Each is a file of ``formats/``."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

from torch import nn

from addenda.bases import LoadedBase
from addenda.core.planning import Plan
from addenda.errors import ConfigError, nearest
from addenda.export.job import Job
from addenda.export.names import format_names
from addenda.export.runtime import Runtime

__all__ = ["Format", "format_of", "require_context", "require_formats", "require_type"]


class Format(ABC):
    """One form that other programs load; stateless. Its file holds ``FORMAT``, an instance."""

    types: ClassVar[tuple[str, ...]] = ()
    """Number formats that it can be written in, or its variants; none where that is not a choice."""
    extra: ClassVar[str] = ""
    """The extra that brings the program by which it is proven; empty where none is needed."""
    library: ClassVar[str] = ""
    """What loads it, as the hub names it."""
    has_context: ClassVar[bool] = False
    """Whether it sets aside a key-value cache of a length that can be chosen."""

    @abstractmethod
    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        """Return what of a planned adapter it cannot carry; empty where nothing is known to stand against it.

        Args:
            planned: what is to be adapted, before anything is trained.
            model: with or without its weights.
            base: what the model was loaded as; None for a module that somebody built.
        """

    def default_type(self, job: Job) -> str | None:
        """Return the type where none is asked for."""
        return self.types[0] if self.types else None

    def space(self, job: Job) -> int:
        """Return at most how many bytes the written files take, those that the gate needs for a while among them."""
        return 8 * sum(parameter.numel() for parameter in job.handle.parameters()) + 2**20

    @abstractmethod
    def write(self, job: Job, folder: Path) -> None:
        """Write the files into an empty folder, a few tensors in memory at a time, and leave the model as it was.

        Raises:
            ExportError: something cannot be carried after all.
        """

    def drifts(self, job: Job) -> bool:
        """Return whether weights are rounded on purpose, so that the file's answers differ from the trained model's."""
        return False

    def rounding(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let a model compute within a ``with`` block what the program rounds by itself, whatever the file holds."""
        return nullcontext()

    @abstractmethod
    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        """Load what was written in the program it is for.

        Args:
            job: as written.
            folder: with the files.
            exact: whether to load a twin in which nothing is rounded; the file itself where that is so anyhow.

        Raises:
            MissingDependencyError: the program is not installed; the hint names the extra.
            ExportError: it refuses the file; with what it said.
        """

    def audit(self, job: Job, folder: Path) -> list[str]:
        """Read the files back, and return what is other than meant, each layer named."""
        return []

    def usage(self, job: Job) -> str:
        """Return Markdown that says how the folder is used."""
        return ""


def format_of(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ConfigError: there is none of that name.

    Example:
        >>> format_of("peft").types
        ()
    """
    if name not in format_names():
        near = nearest(name, format_names(), count=1)
        raise ConfigError(
            f"there is no export format '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"the formats are {', '.join(format_names())}",
        )
    found: Format = importlib.import_module(f"addenda.export.formats.{name.replace('-', '_')}").FORMAT
    return found


def require_type(name: str, kind: str | None) -> None:
    """Refuse a type that a format does not have.

    Raises:
        ConfigError: there is no such format or type.
    """
    types = format_of(name).types
    if kind is not None and kind not in types:
        choices = f"one of {', '.join(types)}" if types else "no type"
        raise ConfigError(
            f"format '{name}' takes {choices}, not '{kind}'", hint="leave it out for the usual one"
        )


def require_context(name: str, context: int | None, room: int | None) -> None:
    """Refuse a length of the cache that a format or a model does not have.

    Args:
        name: of the format.
        context: in tokens; None for the usual one.
        room: tokens of context that the model was built for, where that is known.

    Raises:
        ConfigError: the format has no such thing, or it is out of range.
    """
    if context is None:
        return
    if not format_of(name).has_context:
        able = ", ".join(each for each in format_names() if format_of(each).has_context)
        raise ConfigError(
            f"format '{name}' sets no cache aside, so that it has no context to choose",
            hint=f"leave it out; {able} has one",
        )
    if context < 2 or (room is not None and context > room):
        raise ConfigError(
            f"a context of {context} tokens",
            hint=f"from 2 to {room}, for which the model was built" if room else "2 or more",
        )


def require_formats(
    names: Iterable[str], planned: Plan, model: nn.Module, base: LoadedBase | None = None
) -> None:
    """Refuse an adapter that one of the formats cannot carry, before it is trained.

    Raises:
        ConfigError: there is no such format, or it cannot carry the adapter; all problems at once, and the formats
            that can.
    """
    wanted = {name: format_of(name) for name in names}
    wrong = {name: found for name, each in wanted.items() if (found := each.problems(planned, model, base))}
    if not wrong:
        return
    able = [name for name in format_names() if not format_of(name).problems(planned, model, base)]
    raise ConfigError(
        f"what is to be trained cannot be exported as {', '.join(wrong)}",
        where={name: "; ".join(found) for name, found in wrong.items()},
        hint=f"{', '.join(able)} can carry it" if able else "the native adapter folder keeps everything",
    )
