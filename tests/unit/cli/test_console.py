"""Streams, colour and the shapes of numbers."""

from __future__ import annotations

import io
import json

import pytest

from addenda.cli.console import Console, binary_size, colored, count, duration, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colour_follows_the_environment(
    environment: dict[str, str], terminal: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert colored(Terminal() if terminal else io.StringIO()) is expected


def test_result_goes_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Console().result({"a": 1}, "a is one")
    Console().note("by the way")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a is one\n", "by the way\n")


def test_json_prints_one_document_and_never_forms_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    def text() -> str:
        raise AssertionError("the text was formed")

    Console(json=True).result({"name": "größer"}, text)
    assert json.loads(capsys.readouterr().out) == {"name": "größer"}


def test_quiet_silences_notes_but_not_results(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(verbosity=-1)
    console.note("by the way")
    console.detail("in detail")
    console.result({}, "data")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("data\n", "")


def test_paint_is_plain_where_colour_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Console().paint("trained", fg="green") == "trained"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Console().paint("trained", fg="green") == "\x1b[32mtrained\x1b[0m"


def test_table_keeps_columns_apart_and_trims_line_ends() -> None:
    lines = table([["a", 1234, "x y"], ["long name", 5, ""]], ["name", "n", "note"]).splitlines()
    assert lines == ["name           n  note", "a          1,234  x y", "long name      5"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (2**41, "2.0 TiB")],
)
def test_sizes_use_the_largest_unit(size: float, text: str) -> None:
    assert binary_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1m 00s"), (7199, "1h 59m")],
)
def test_durations_round_without_saying_sixty_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_count_agrees_in_number() -> None:
    assert [count(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
