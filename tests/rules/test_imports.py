"""Who may import whom, and what a cold start may cost."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from addenda.cli.app import VERBS

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "pandas", "rich", "pydantic", "huggingface_hub", "gguf")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def loaded_by(code: str) -> set[str]:
    """The heavy packages in ``sys.modules`` after running ``code`` in a fresh interpreter."""
    probe = f"import sys\n{code}\nprint(' '.join(n for n in {HEAVY!r} if n in sys.modules))"
    answer = run(sys.executable, "-c", probe)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split("\n")[-2].split())


def test_import_contracts_hold() -> None:
    answer = run(str(BIN / "lint-imports"), "--no-cache")
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert "0 broken" in answer.stdout


def test_importing_the_package_is_light() -> None:
    assert loaded_by("import addenda, addenda.errors") == set()


def test_importing_the_command_line_is_light() -> None:
    modules = ", ".join(f"addenda.cli.{verb}" for verb in ["app", *VERBS])
    assert loaded_by(f"import {modules}") == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_needs_no_model_library(verb: str) -> None:
    code = f"from addenda.cli.app import run\nassert run([{verb!r}, '--help']) == 0"
    assert not loaded_by(code) & {"torch", "transformers", "pyarrow", "pandas"}


@pytest.mark.parametrize("command", [["check", "examples/data/support.jsonl"], ["models"]], ids=" ".join)
def test_a_verb_that_needs_no_model_starts_without_torch(command: list[str]) -> None:
    code = f"from addenda.cli.app import run\nassert run([*{command!r}, '--json']) == 0"
    assert not loaded_by(code) & {"torch", "transformers", "pyarrow", "pandas"}


def least_seconds(*command: str, repeats: int = 9) -> float:
    """The least processor time of several runs: the wall time on a machine that does nothing else."""
    times = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_answers_within_100_ms() -> None:
    """The installed script's ``--help``, beyond what this machine needs to start Python at all.

    Python's own start is measured beside it, and processor time is compared, so that neither a slow nor a busy machine
    decides the test. The command is one thread that waits for nothing, so on an idle machine this is its wall time.
    """
    bare = least_seconds(sys.executable, "-c", "pass")
    whole = least_seconds(str(BIN / "addenda"), "--help")
    assert whole - bare <= 0.100, f"--help {whole * 1000:.0f} ms, of which Python itself {bare * 1000:.0f} ms"
