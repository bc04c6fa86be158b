"""The command line on a GPU, from rows to report."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from addenda.cli.app import run

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_a_run_takes_the_gpu_by_itself_learns_and_answers_there(
    weights: str, tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    asked = ("train.epochs=6", "evals.samples=2", "evals.max_new_tokens=8", f"base.weights={weights}")
    sets = [part for text in asked for part in ("--set", text)]
    assert run(["train", str(chat_rows), "--base", str(tiny_model), "--out", str(folder), "-q", *sets]) == 0
    assert tomllib.loads((folder / "recipe.resolved.toml").read_text())["base"]["device"] == "cuda"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_nll_after"] < summary["heldout_nll_before"]
    assert summary["peak_cuda_bytes"] > 2**20
    assert run(["chat", "--adapter", str(folder), "--prompt", "Where is the hat?"]) == 0
    assert capsys.readouterr().out.strip()
