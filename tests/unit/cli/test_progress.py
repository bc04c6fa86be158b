"""Progress: silent for short steps, one line every few seconds in a log, a bar on a terminal."""

from __future__ import annotations

import pytest

from addenda.cli.console import Console
from addenda.cli.progress import ProgressDisplay
from addenda.core.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(capsys: pytest.CaptureFixture[str], seconds_per_event: float, **options: object) -> list[str]:
    clock = Clock()
    display = ProgressDisplay(Console(**options), clock=clock, live=False)  # type: ignore[arg-type]
    for done in range(11):
        display(Progress("encode", done=done, total=10, unit="rows"))
        clock.now += seconds_per_event
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_short_step_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, 0.1) == []


def test_a_long_step_shows_a_line_per_period_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, 3.0)
    assert lines == [
        "encode: 10% 1/10 rows  27 s left",
        "encode: 50% 5/10 rows  15 s left",
        "encode: 90% 9/10 rows  3.0 s left",
        "encode: 10/10 rows  in 30 s",
    ]


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, 3.0, verbosity=-1) == []


def test_time_left_ignores_what_was_already_there(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = ProgressDisplay(Console(), clock=clock, live=False)
    display(Progress("download", done=900, total=1000, unit="bytes"))
    clock.now += 5
    display(Progress("download", done=950, total=1000, unit="bytes"))
    assert capsys.readouterr().err == "download: 95% 950 B/1000 B  5.0 s left\n"


def test_unknown_total_shows_an_amount_and_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = ProgressDisplay(Console(), clock=clock, live=False)
    display(Progress("read", done=0, unit="rows"))
    clock.now += 5
    display(Progress("read", done=1200, unit="rows"))
    assert capsys.readouterr().err == "read: 1,200 rows\n"


def test_a_terminal_gets_a_bar_and_lines_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressDisplay(Console(), clock=clock, live=True) as display:
        display(Progress("train", done=0, total=4, unit="steps"))
        clock.now += 3
        display(Progress("train", done=2, total=4, unit="steps"), "loss 1.25")
        display.say("[saved] a checkpoint")
        display.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[saved] a checkpoint" in captured.err
