"""The example of a method in a package of its own, installed beside this one, is a method like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import addenda

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_method_outside"
SOURCE = Path(addenda.__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which it is installed from a copy, without the network; the copy lies beside it."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(EXAMPLE, folder / "copy")
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(folder, "pip", "install", *options, "--target", str(folder / "packages"), str(folder / "copy"))
    return folder


def run(folder: Path, module: str, *arguments: str) -> str:
    """Run a module of Python that finds the installed package; returns what it prints."""
    path = os.pathsep.join([str(folder / "packages"), str(SOURCE), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder / "copy",
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_with_its_settings(installed: Path) -> None:
    [found] = [each for each in json.loads(run(installed, "addenda", "methods", "--json"))["methods"]
               if each["name"] == "cosine-scale"]  # fmt: skip
    assert found["mergeable"]


def test_its_own_tests_hold_it_to_what_holds_for_every_method(installed: Path) -> None:
    said = run(
        installed,
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "[cosine-scale-0-linear] and not compiled",
        "tests",
    )
    assert int(said.split(" passed")[0].split()[-1]) >= 15
    assert "failed" not in said


def test_a_run_trains_with_it_by_the_keys_of_a_recipe(
    installed: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    settings = [f"--set={each}" for each in ("method.terms=5", "train.epochs=1", "evals.samples=0")]
    out = str(tmp_path / "run")
    base = ["--base", str(tiny_model), "--method", "cosine-scale", "--out", out]
    run(installed, "addenda", "train", str(chat_rows), *base, *settings)
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert (saved["method"], saved["settings"]["terms"]) == ("cosine-scale", 5)


@pytest.mark.slow
def test_the_suite_shows_where_it_stands(installed: Path) -> None:
    said = run(installed, "addenda.conformance", "cosine-scale")
    [line] = [line for line in said.splitlines() if line.startswith("cosine-scale")]
    assert line.split()[1:4] == ["+", "+", "+"]
    assert "F" not in line
    assert "-" in line.removeprefix("cosine-scale")
