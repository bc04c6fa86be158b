"""The command itself: verbs found, usage errors answered, exit codes, streams, and what it must not import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from addenda.cli import app
from addenda.cli.app import VERBS, cli, run

HERE = Path(__file__).parents[3]


def addenda(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "addenda", *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE / "src"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", VERBS)
def test_the_list_of_verbs_says_what_the_commands_say(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert (command.name, command.short_help) == (name, VERBS[name])
    assert command.help


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_shows_examples_and_takes_the_common_switches(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  addenda {name}" in shown.partition("Examples:")[2]
    assert all(switch in shown for switch in ("--json", "--quiet", "--verbose", "Exit codes"))


def test_help_lists_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in VERBS)
    assert all(f"\n  {code} " in shown for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 130, 143))


def test_no_verb_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Verbs:" in shown.err


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian", "rows.jsonl"]) == 2
    assert "hint: did you mean 'train'?" in capsys.readouterr().err


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--jsn"]) == 2
    assert "hint: did you mean '--json'?" in capsys.readouterr().err


def test_usage_errors_are_json_where_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json", "--frobnicate"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert set(error) == {"type", "message", "where", "hint"}
    assert error["type"] == "UsageError"
    assert "--frobnicate" in error["message"]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (RuntimeError("a\nb"), 1)]
)
def test_a_verb_that_fails_ends_with_its_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command("doctor")
    def command() -> None:
        raise error

    monkeypatch.setattr(app.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert run(["doctor"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_outside_training_has_its_code_its_message_and_its_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command("doctor")
    @click.option("--json", is_flag=True)
    def command(json: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(app.LazyGroup, "get_command", lambda self, ctx, name: command)
    monkeypatch.setattr(sys, "argv", ["addenda", "doctor", "--json"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            app.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["type"] == "Interrupted"
    assert "error: interrupted" in shown.err


def test_unexpected_error_is_one_line_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command("doctor")
    @click.option("-v", count=True)
    def command(v: int) -> None:
        raise RuntimeError("tensor of the wrong kind\nmore")

    monkeypatch.setattr(app.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert run(["doctor"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected RuntimeError: tensor of the wrong kind\n")
    assert "ADDENDA_DEBUG=1" in shown
    run(["doctor", "-vv"])
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ADDENDA_DEBUG", "1")
    run(["doctor"])
    assert "Traceback" in capsys.readouterr().err


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from addenda.cli.app import run; run(['--help']); run(['--version']); run(['train', '--help']);"
        "heavy = {'torch', 'transformers', 'pyarrow', 'rich', 'pydantic', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(HERE / "src")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_version_names_what_it_runs_on() -> None:
    shown = addenda("--version").stdout
    assert [line.split()[0] for line in shown.splitlines()][:4] == [
        "addenda",
        "python",
        "torch",
        "transformers",
    ]


@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), (">/dev/full", 6), ("--json >/dev/full", 6)])
def test_an_output_that_takes_nothing_gives_a_code_and_no_traceback(redirect: str, code: int) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m addenda methods {redirect}"],
        env={**os.environ, "PYTHONPATH": str(HERE / "src")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("the disk is full" in done.stderr) == (code == 6)


def test_a_reader_that_goes_away_is_not_a_fault() -> None:
    command = f"{sys.executable} -m addenda --help | true"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(HERE / "src")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
