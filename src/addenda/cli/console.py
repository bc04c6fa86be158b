"""Streams and switches every verb shares: data on standard output, everything else on standard error.

Colour is used only on a terminal that wants it: NO_COLOR, FORCE_COLOR and TERM=dumb are obeyed per stream.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import click

__all__ = ["Console", "binary_size", "colored", "count", "duration", "table"]


def colored(stream: IO[str]) -> bool:
    """Whether ANSI colour may be written to ``stream`` (https://no-color.org, https://force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


@dataclass(frozen=True)
class Console:
    """What one verb may print, and where.

    Args:
        json: print one JSON document on standard output instead of text.
        verbosity: -1 quiet (errors only), 0 normal, 1 details, 2 tracebacks.
    """

    json: bool = False
    verbosity: int = 0

    def result(self, document: object, text: str | Callable[[], str]) -> None:
        """Print the verb's result: ``document`` with ``--json``, else ``text``."""
        if self.json:
            rendered = json.dumps(document, ensure_ascii=False, indent=2, default=str)
        else:
            rendered = text if isinstance(text, str) else text()
        click.echo(rendered, color=True)

    def note(self, text: str = "") -> None:
        """Say something that is not data: standard error, silent with ``-q``."""
        if self.verbosity >= 0:
            click.echo(text, err=True, color=True)

    def detail(self, text: str) -> None:
        """Say something only ``-v`` asks for."""
        if self.verbosity >= 1:
            click.echo(text, err=True, color=True)

    def paint(self, text: str, *, err: bool = False, **style: Any) -> str:
        """Style ``text`` for the stream it goes to, or leave it plain where colour is not wanted."""
        return click.style(text, **style) if colored(sys.stderr if err else sys.stdout) else text


def table(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> str:
    """Align ``rows`` under ``headers``; a column whose cells are all numbers is set to the right.

    Example:
        >>> print(table([["lora", 12], ["bitfit", 3]], ["method", "size"]))
        method  size
        lora      12
        bitfit     3
    """
    body = [[_cell(cell) for cell in row] for row in rows]
    lines = [list(headers), *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    right = [bool(body) and all(_numeric(line[column]) for line in body) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit()


def binary_size(count_of_bytes: float) -> str:
    """Bytes in the largest binary unit that keeps them above one.

    Example:
        >>> binary_size(3 * 1024 * 1024)
        '3.0 MiB'
    """
    size = float(count_of_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(3725), duration(42), duration(0.4)
        ('1h 02m', '42 s', '0.4 s')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def count(number: int, noun: str) -> str:
    """A number with its noun in the right form.

    Example:
        >>> count(1, "row"), count(1200, "row")
        ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
