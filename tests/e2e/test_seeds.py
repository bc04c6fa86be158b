"""``train.seeds``: one recipe, several seeds, and figures with their spread."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from addenda.cli.app import run
from addenda.errors import TrainingError
from addenda.evals.record import RunRecord
from addenda.evals.report import render_report
from addenda.evals.results import HeldoutMetrics, RowScore
from addenda.recipe import RunSummary
from addenda.recipe.seeds import summed_up

QUICK = (
    "train.epochs=2",
    "evals.samples=1",
    "evals.max_new_tokens=4",
    "base.dtype=float32",
    "train.batch_size=8",
)


def train(data: Path, model: Path, out: Path, *sets: str, flags: tuple[str, ...] = ()) -> int:
    quick = [part for text in (*QUICK, *sets) for part in ("--set", text)]
    return run(["train", str(data), "--base", str(model), "--out", str(out), "-q", *quick, *flags])


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def seeds(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "three"
    rate = "train.learning_rate=1e-2"
    assert train(chat_rows, tiny_model, folder, "train.seeds=3", "train.seed=5", rate) == 0
    return folder


def test_each_seed_is_a_run_and_the_first_one_is_that_of_the_folder(
    seeds: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    found = [summary(seeds / "seeds" / f"seed-{seed}") for seed in (5, 6, 7)]
    whole = summary(seeds)
    assert {key: whole[key] for key in found[0]} == found[0]
    assert len({each["heldout_nll_after"] for each in found}) == 3
    assert len({each["heldout_nll_before"] for each in found}) == 1, "on the same held-out rows"
    kept = (seeds / "adapter" / "adapter.safetensors").read_bytes()
    assert kept == (seeds / "seeds" / "seed-5" / "adapter" / "adapter.safetensors").read_bytes()
    alone = tmp_path / "alone"
    assert train(chat_rows, tiny_model, alone, "train.seed=5", "train.learning_rate=1e-2") == 0
    assert summary(alone)["heldout_nll_after"] == pytest.approx(whole["heldout_nll_after"], rel=5e-3)
    assert "seeds" not in summary(alone)
    assert not (alone / "seeds").exists()


def test_summary_record_and_report_tell_mean_and_interval(seeds: Path) -> None:
    found = [summary(seeds / "seeds" / f"seed-{seed}") for seed in (5, 6, 7)]
    told = summary(seeds)["seeds"]
    assert (told["seeds"], told["failed"]) == ([5, 6, 7], {})
    for key in ("heldout_nll_after", "heldout_token_accuracy_after", "base_kl_general"):
        values = [each[key] for each in found]
        assert told[key]["values"] == values
        assert told[key]["mean"] == pytest.approx(statistics.mean(values))
        half = 4.302653 * statistics.stdev(values) / 3**0.5  # Student's t, two degrees of freedom
        assert told[key]["interval"] == pytest.approx(
            [statistics.mean(values) - half, statistics.mean(values) + half], rel=1e-5
        )
    record = RunRecord.from_json((seeds / "record.json").read_text())
    assert record.seeds is not None
    assert record.seeds.seeds == (5, 6, 7)
    page = (seeds / "report.html").read_text()
    assert page == render_report(record)
    assert "Over the seeds" in page
    assert f"{told['heldout_nll_after']['mean']:.4f}" in page


def test_the_adapter_of_the_folder_is_used_as_any_other(
    seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", "--adapter", str(seeds / "adapter"), "--prompt", "Do you have a red hat?", "-q"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_run_with_seeds_that_was_cut_off_goes_on(seeds: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(seeds, out)
    for name in ("summary.json", "record.json", "report.html"):
        (out / name).unlink()
    shutil.rmtree(out / "seeds" / "seed-7")
    assert run(["train", "--resume", "--out", str(out), "-q"]) == 0
    told, before = summary(out)["seeds"], summary(seeds)["seeds"]
    assert told["heldout_nll_after"]["values"] == pytest.approx(
        before["heldout_nll_after"]["values"], rel=5e-3
    )


def test_a_seed_that_fails_is_named(seeds: Path, tmp_path: Path) -> None:
    one = seeds / "seeds" / "seed-5"
    record = RunRecord.from_json((one / "record.json").read_text())
    done = RunSummary(one, summary(one), record, HeldoutMetrics.of([RowScore(1.0, 1, 1)]))
    found = summed_up(tmp_path, {5: done, 6: TrainingError("the loss is nan")})
    assert found.figures["seeds"]["failed"] == {"6": "the loss is nan"}
    assert found.figures["seeds"]["heldout_nll_after"]["interval"] is None
    assert "Seed 6 ended early: the loss is nan." in (tmp_path / "report.html").read_text()


def test_a_first_seed_that_fails_ends_the_run(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code = train(chat_rows, tiny_model, out, "train.seeds=2", "train.learning_rate=1e30")
    assert code == 1
    assert "loss is" in capsys.readouterr().err
    assert not (out / "summary.json").exists()
    assert train(chat_rows, tiny_model, tmp_path / "x", "train.seeds=2", flags=("--profile",)) == 2
    assert "train.seeds" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
