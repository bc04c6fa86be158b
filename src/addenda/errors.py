"""The exception tree: what went wrong, where, what exists, and how to fix it.

AddendaError
├── ConfigError            a setting or recipe key is wrong (also ValueError)
├── TargetError            a target matches nothing, or something unsuitable (also ValueError)
├── MethodError            a method cannot do what was asked (also ValueError)
├── BaseModelError         a base model cannot be read or used (also ValueError)
├── DataError              the training data is wrong (also ValueError)
├── NotFoundError          a file, model or adapter does not exist (also LookupError)
├── OutOfMemory            the machine's memory does not suffice (also MemoryError)
├── DiskFullError          the disk is full (also OSError)
├── BusyError              another run holds the folder (also RuntimeError)
├── UnsafeError            refused because it could run code or escape a folder (also ValueError)
├── CheckpointError        a checkpoint or adapter file is damaged or does not fit (also ValueError)
├── TrainingError          training cannot go on (also RuntimeError)
├── KernelError            the machine code cannot be compiled (also RuntimeError)
├── ExportError            an export failed or did not answer as the trained model does (also RuntimeError)
└── MissingDependencyError an optional package is not installed (also ImportError)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

__all__ = [
    "AddendaError",
    "BaseModelError",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "ExportError",
    "KernelError",
    "MethodError",
    "MissingDependencyError",
    "NotFoundError",
    "OutOfMemory",
    "TargetError",
    "TrainingError",
    "UnsafeError",
    "nearest",
    "visible",
]


class AddendaError(Exception):
    """Base of every error Addenda raises on purpose.

    Args:
        message: one lower-case sentence without a full stop; values in quotes.
        where: facts that locate the problem, printed one per line as ``key: value``.
        hint: what to do about it.

    Example:
        >>> print(AddendaError("target 'v_prj' matched no module", where={"model": "Llama"}, hint="try 'v_proj'"))
        target 'v_prj' matched no module
          model: Llama
        <BLANKLINE>
        hint: try 'v_proj'
    """

    exit_code = 1

    def __init__(self, message: str, *, where: Mapping[str, object] | None = None, hint: str = "") -> None:
        self.message = message
        self.where = dict(where or {})
        self.hint = hint
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.message, *(f"  {key}: {value}" for key, value in self.where.items())]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)

    def __str__(self) -> str:
        # KeyError-like stdlib parents would quote the message; ours is shown as written.
        return self._render()


class ConfigError(AddendaError, ValueError):
    """A setting is missing, unknown, of the wrong type, or out of range."""

    exit_code = 2


class TargetError(AddendaError, ValueError):
    """A target pattern matches no layer, or a layer the method cannot adapt."""

    exit_code = 2


class MethodError(AddendaError, ValueError):
    """A method was asked for something it cannot do."""

    exit_code = 2


class BaseModelError(AddendaError, ValueError):
    """A base model's files cannot be read, or do not form a usable model."""


class DataError(AddendaError, ValueError):
    """The training data has errors, so no run may start on it."""

    exit_code = 3


class NotFoundError(AddendaError, LookupError):
    """A named file, folder, model or adapter does not exist."""

    exit_code = 4


class OutOfMemory(AddendaError, MemoryError):
    """The step did not fit into memory."""

    exit_code = 5


class DiskFullError(AddendaError, OSError):
    """A file could not be written because the disk is full."""

    exit_code = 6


class BusyError(AddendaError, RuntimeError):
    """Another process holds the run folder."""

    exit_code = 7


class UnsafeError(AddendaError, ValueError):
    """Refused: it could run foreign code, or reach outside its folder."""

    exit_code = 8


class CheckpointError(AddendaError, ValueError):
    """A checkpoint or adapter file is damaged, incomplete, or belongs to something else."""


class TrainingError(AddendaError, RuntimeError):
    """Training cannot go on, or taught nothing."""


class KernelError(AddendaError, RuntimeError):
    """The kernels cannot be compiled on this machine; plain PyTorch does their work."""


class ExportError(AddendaError, RuntimeError):
    """An export failed, or does not answer as the trained model does."""


class MissingDependencyError(AddendaError, ImportError):
    """An optional package is needed; the hint names the extra that brings it."""


def nearest(word: str, names: Iterable[str], *, count: int = 3) -> list[str]:
    """Return up to ``count`` of ``names`` that look like ``word``, best first.

    Example:
        >>> nearest("v_prj", ["q_proj", "v_proj"])[0]
        'v_proj'
        >>> nearest("lroa", ["road", "lora"])[0]
        'lora'
    """
    close = difflib.get_close_matches(word, list(names), n=max(count, 8), cutoff=0.5)
    # Letters in another order are the likeliest slip, and look farther off than a letter in place of another.
    return sorted(close, key=lambda name: sorted(name) != sorted(word))[:count]


# All but tab and line feed; then the marks that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Write control characters out, so that a terminal shows what a file holds and obeys none of it.

    Example:
        >>> visible("a\x1b[2Jb\tc")
        'a\\x1b[2Jb\tc'
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)
