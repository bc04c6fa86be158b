"""Show the progress of long steps: a bar on a terminal, one plain line every few seconds elsewhere.

A step shorter than two seconds shows nothing. Everything goes to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from addenda.cli.console import Console, binary_size, duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from addenda.core.progress import Progress

__all__ = ["PATIENCE", "PERIOD", "ProgressDisplay", "terminal"]

PATIENCE = 2.0
"""Seconds a step may take before anything is shown."""
PERIOD = 10.0
"""Seconds between two plain lines of one step."""


def terminal() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class ProgressDisplay:
    """Watches `Progress` events; use as a context manager and pass it as ``on_progress``.

    Args:
        console: with ``-q`` nothing is shown.
        clock: seconds, monotonic.
        live: draw bars; None decides from the terminal.
    """

    def __init__(
        self, console: Console, *, clock: Callable[[], float] = time.monotonic, live: bool | None = None
    ) -> None:
        self._silent = console.verbosity < 0
        self._clock = clock
        self._live = terminal() if live is None else live
        self._started: dict[str, tuple[float, float]] = {}
        self._shown: dict[str, float] = {}
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars down; the display can be used again."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def __call__(self, event: Progress, detail: str = "") -> None:
        """Show ``event``; ``detail`` is appended to its line, such as a loss."""
        if self._silent:
            return
        now = self._clock()
        start, already = self._started.setdefault(event.task, (now, event.done))
        finished = event.total is not None and event.done >= event.total
        if now - start >= PATIENCE or event.task in self._tasks:
            left = _seconds_left(event, now - start, already)
            if self._live:
                self._draw(event, detail, left)
            elif finished or now - self._shown.get(event.task, -PERIOD) >= PERIOD:
                self._shown[event.task] = now
                click.echo(_line(event, detail, now - start if finished else left, finished), err=True)
        if finished:
            self._started.pop(event.task, None)
            self._shown.pop(event.task, None)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if self._silent:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _draw(self, event: Progress, detail: str, left: float | None) -> None:
        bars = self._bars or self._open()
        if event.task not in self._tasks:
            self._tasks[event.task] = bars.add_task(event.task, total=event.total, text="")
        text = f"{_amount(event)}{'  ' + detail if detail else ''}{_remaining(left)}"
        bars.update(
            self._tasks[event.task],
            completed=event.done,
            total=event.total,
            description=event.task,
            text=text,
        )

    def _open(self) -> RichProgress:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=RichConsole(stderr=True),
            transient=True,
        )
        bars.start()
        self._bars = bars
        return bars


def _seconds_left(event: Progress, elapsed: float, already: float) -> float | None:
    """Time left at the rate so far, ignoring what was done before the first event (a resumed download)."""
    fresh = event.done - already
    if event.total is None or fresh <= 0 or elapsed <= 0:
        return None
    return max(0.0, (event.total - event.done) * elapsed / fresh)


def _amount(event: Progress) -> str:
    show = binary_size if event.unit == "bytes" else lambda number: f"{number:,.0f}"
    total = f"/{show(event.total)}" if event.total else ""
    unit = f" {event.unit}" if event.unit and event.unit != "bytes" else ""
    return f"{show(event.done)}{total}{unit}"


def _remaining(left: float | None) -> str:
    return "" if left is None else f"  {duration(left)} left"


def _line(event: Progress, detail: str, seconds: float | None, finished: bool) -> str:
    share = f" {event.fraction:.0%}" if event.fraction is not None and not finished else ""
    ending = f"  in {duration(seconds)}" if finished and seconds is not None else _remaining(seconds)
    return f"{event.task}:{share} {_amount(event)}{'  ' + detail if detail else ''}{ending}"
