"""Every failure has its exit code, its text, and its JSON form."""

from __future__ import annotations

import errno
import re

import click
import pytest
from safetensors import SafetensorError

from addenda import errors
from addenda.cli.failures import EXIT_CODES, describe
from addenda.settings import resolve


def test_what_a_file_says_is_shown_and_not_obeyed() -> None:
    failure = describe(errors.BaseModelError("the template says: \x1b[2J", where={"file": "a\x07b"}))
    assert failure.text() == "error: the template says: \\x1b[2J\n  file: a\\x07b"


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name not in ("nearest", "visible")])
def test_every_addenda_error_keeps_message_hint_and_code(name: str) -> None:
    kind = getattr(errors, name)
    failure = describe(kind("it broke", where={"file": "a.txt"}, hint="mend it"))
    assert failure.exit_code == kind.exit_code
    assert failure.exit_code in EXIT_CODES
    assert failure.text() == "error: it broke\n  file: a.txt\n\nhint: mend it"
    assert failure.document() == {
        "error": {"type": name, "message": "it broke", "where": {"file": "a.txt"}, "hint": "mend it"}
    }


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 6, "the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 4, "no such file or folder"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), 6, "a file became larger than is allowed here"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1, "permission denied"),
    ],
)
def test_system_errors_name_the_path(error: OSError, code: int, text: str) -> None:
    failure = describe(error)
    assert (failure.exit_code, failure.message, failure.where) == (code, text, {"path": "/a/b"})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
def test_running_out_of_memory_says_what_to_set(error: Exception) -> None:
    failure = describe(error)
    assert failure.exit_code == 5
    known = resolve().values()
    named = re.findall(r"\b(?:train|data)\.\w+", failure.hint)
    assert named
    assert [key for key in named if key not in known] == []


def test_interrupt_is_not_called_a_fault() -> None:
    assert describe(KeyboardInterrupt()).exit_code == describe(click.Abort()).exit_code == 130


def test_a_full_disk_is_one_whatever_library_meets_it() -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (describe(error).exit_code, describe(error).message) == (6, "the disk is full")


def test_an_interrupt_says_how_to_go_on() -> None:
    stopped = KeyboardInterrupt()
    stopped.add_note("go on with: addenda train --resume")
    assert describe(stopped).hint == "go on with: addenda train --resume"


def test_usage_error_reads_like_ours_and_points_to_help() -> None:
    context = click.Context(click.Command("check"), info_name="check")
    failure = describe(click.UsageError("Missing argument 'DATA'.", ctx=context))
    assert (failure.message, failure.exit_code) == ("missing argument 'DATA'", 2)
    assert failure.hint == "'check --help' shows what it takes"
