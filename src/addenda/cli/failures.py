"""What a failure looks like from outside: one exit code, one message, no traceback unless asked for."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import click

from addenda.errors import AddendaError, visible

__all__ = ["EXIT_CODES", "Failure", "describe", "report"]

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "failed",
    2: "wrong usage or configuration",
    3: "bad data",
    4: "not found",
    5: "out of memory",
    6: "disk full",
    7: "conflict: the folder is taken or in use",
    8: "refused as unsafe",
    130: "interrupted (Ctrl-C)",
    143: "terminated (SIGTERM)",
}


@dataclass(frozen=True)
class Failure:
    """One failure as the user meets it."""

    type: str
    message: str
    exit_code: int
    hint: str = ""
    where: Mapping[str, object] = field(default_factory=dict)

    def text(self) -> str:
        """The message, its facts one per line, and the hint after a blank line."""
        lines = [f"error: {self.message}", *(f"  {key}: {value}" for key, value in self.where.items())]
        text = "\n".join([*lines, "", f"hint: {self.hint}"] if self.hint else lines)
        return visible(text)  # a file's own words may hold what a terminal would obey

    def document(self) -> dict[str, object]:
        """The JSON form: ``{"error": {"type", "message", "where", "hint"}}``."""
        where = {key: str(value) for key, value in self.where.items()}
        return {"error": {"type": self.type, "message": self.message, "where": where, "hint": self.hint}}


def describe(error: BaseException) -> Failure:
    """Say what ``error`` means to the user; unknown errors become exit 1 with a pointer to the traceback."""
    kind = type(error).__name__
    if isinstance(error, AddendaError):
        return Failure(kind, error.message, error.exit_code, error.hint, error.where)
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        # Click turns Ctrl-C into an Abort and keeps what was raised as its cause.
        cause = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
        hint = "; ".join(getattr(cause, "__notes__", ()))
        return Failure("Interrupted", str(cause) or "interrupted", getattr(cause, "exit_code", 130), hint)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return _system(error)
    if os.strerror(errno.ENOSPC) in str(error):  # as safetensors says it, in an exception of its own
        return _system(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        hint = "set train.tokens_per_micro_batch lower, data.max_tokens lower, or take a smaller base"
        return Failure("OutOfMemory", f"out of memory: {_first_line(error)}", 5, hint)
    hint = "this is a fault in addenda; ADDENDA_DEBUG=1 or -vv shows the traceback"
    return Failure(kind, f"unexpected {kind}: {_first_line(error)}", 1, hint)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _usage(error: click.ClickException) -> Failure:
    hint, context = "", getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        hint = "did you mean " + " or ".join(f"'{name}'" for name in error.possibilities) + "?"
    elif context is not None:
        hint = f"'{context.command_path} --help' shows what it takes"
    message = error.message if isinstance(error, click.NoSuchOption) else error.format_message()
    message = message[:1].lower() + message[1:].rstrip(".")
    return Failure("UsageError", message, error.exit_code, hint)


def _system(error: OSError) -> Failure:
    where = {"path": error.filename} if error.filename else {}
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure("DiskFullError", "the disk is full", 6, "free some space and run again", where)
    if error.errno == errno.EFBIG:
        hint = "raise the limit (ulimit -f), or write to another disk"
        return Failure("DiskFullError", "a file became larger than is allowed here", 6, hint, where)
    if isinstance(error, FileNotFoundError):
        return Failure("NotFoundError", "no such file or folder", 4, "", where)
    reason = (error.strerror or _first_line(error)).lower()
    return Failure(type(error).__name__, reason, 1, "", where)


def report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Print ``error`` (text on standard error; with ``as_json`` a document on standard output) and return its code."""
    import json
    import traceback

    failure = describe(error)
    if debug or os.environ.get("ADDENDA_DEBUG") == "1":
        click.echo("".join(traceback.format_exception(error)), err=True)
    click.echo(failure.text(), err=True)
    if as_json:
        with contextlib.suppress(OSError):  # standard output itself may be what failed
            click.echo(json.dumps(failure.document(), ensure_ascii=False, indent=2))
    return failure.exit_code
