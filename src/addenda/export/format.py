"""What an export format is: what it can hold, and how it is written. Each is a file of ``formats/``."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from addenda.bases import LoadedBase
from addenda.core.handle import Handle
from addenda.core.planning import Plan
from addenda.core.progress import OnProgress
from addenda.errors import ConfigError, nearest
from addenda.export.names import format_names
from addenda.export.parity import Parity

__all__ = ["Format", "format_of", "require_formats"]


class Format(ABC):
    """One form that other programs load; stateless. Its file holds ``FORMAT``, an instance."""

    dtypes: ClassVar[tuple[str, ...]] = ()
    """Number formats that its weights can be written in; none where that is not a choice."""

    @abstractmethod
    def problems(self, planned: Plan, base: LoadedBase) -> list[str]:
        """Return what of a planned adapter it cannot carry; empty where nothing is known to stand against it.

        Args:
            planned: what is to be adapted, before anything is trained.
            base: with or without its weights.
        """

    @abstractmethod
    def write(
        self,
        base: LoadedBase,
        handle: Handle,
        folder: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Parity:
        """Write the adapter into a new folder, once it has been proven to answer like the adapted model.

        Args:
            base: carrying the adapter.
            handle: the adapter.
            folder: must not exist, or be empty.
            dtype: one of `dtypes`; None keeps what there is.
            provenance: what the adapter's manifest says of its training.
            on_progress: told of the steps.
        """


def format_of(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ConfigError: there is none of that name.

    Example:
        >>> format_of("peft").dtypes
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


def require_formats(names: Iterable[str], planned: Plan, base: LoadedBase) -> None:
    """Refuse an adapter that one of the formats cannot carry, before it is trained.

    Raises:
        ConfigError: there is no such format, or it cannot carry the adapter; all problems at once, and the formats
            that can.
    """
    wanted = {name: format_of(name) for name in names}
    wrong = {name: found for name, each in wanted.items() if (found := each.problems(planned, base))}
    if not wrong:
        return
    able = [name for name in format_names() if not format_of(name).problems(planned, base)]
    raise ConfigError(
        f"what is to be trained cannot be exported as {', '.join(wrong)}",
        where={name: "; ".join(found) for name, found in wrong.items()},
        hint=f"{', '.join(able)} can carry it" if able else "the native adapter folder keeps everything",
    )
