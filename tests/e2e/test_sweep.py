"""``addenda sweep`` from the command line to its folder, on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from addenda.cli.app import run

QUICK = ("train.epochs=2", "base.dtype=float32", "train.batch_size=8")


def arguments(data: Path, model: Path, out: Path, *more: str, sets: tuple[str, ...] = ()) -> list[str]:
    quick = [part for text in (*QUICK, *sets) for part in ("--set", text)]
    return ["sweep", str(data), "--base", str(model), "--out", str(out), "-q", *quick, *more]


def document(capsys: pytest.CaptureFixture[str], given: list[str], code: int = 0) -> dict[str, Any]:
    assert run([*given, "--json"]) == code, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_grid_is_ordered_by_held_out_loss_and_its_best_recipe_trains_the_same(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    over = ("--over", "train.learning_rate=1e-5,1e-2", "--over", "method.rank=2,4")
    found = document(capsys, arguments(chat_rows, tiny_model, out, *over))
    assert json.loads((out / "sweep.json").read_text()) == found
    trials = found["trials"]
    assert {tuple(trial["settings"].items()) for trial in trials} == {
        (("train.learning_rate", rate), ("method.rank", rank)) for rate in (1e-5, 1e-2) for rank in (2, 4)
    }
    losses = [trial["heldout_nll"] for trial in trials]
    assert losses == sorted(losses)
    assert {trial["settings"]["train.learning_rate"] for trial in trials[:2]} == {1e-2}
    assert found["best"] == trials[0]["name"]
    for trial in trials:
        summary = json.loads((Path(trial["folder"]) / "summary.json").read_text())
        assert summary["heldout_nll_after"] == pytest.approx(trial["heldout_nll"], rel=1e-6)
        assert json.loads((Path(trial["folder"]) / "record.json").read_text())["samples"] == []
        low, high = trial["heldout_nll_interval"]
        assert low < trial["heldout_nll"] < high
        assert trial["worse_than_best"] == bool(
            trial["behind_best_interval"] and trial["behind_best_interval"][0] > 0
        )
    assert all(trial["worse_than_best"] for trial in trials[2:])  # hardly trained at all
    assert "samples = 5 " in (out / "best.toml").read_text()  # a run of its own answers as any does
    again = ["train", "--recipe", str(out / "best.toml"), "--out", str(tmp_path / "again"), "-q"]
    assert document(capsys, again)["heldout_nll_after"] == pytest.approx(losses[0], rel=1e-3)


def test_a_resumed_sweep_runs_what_is_missing_alone(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    given = arguments(chat_rows, tiny_model, out, "--over", "train.learning_rate=1e-3,1e-2")
    whole = document(capsys, given)
    assert run(given) == 7, "a folder with a sweep is not written over"
    capsys.readouterr()
    shutil.rmtree(out / "trials" / "trial-002")
    kept = {
        path: path.stat().st_mtime_ns for path in (out / "trials" / "trial-001").rglob("*") if path.is_file()
    }
    resumed = document(capsys, ["sweep", "--resume", "--out", str(out), "-q"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for one, other in zip(whole["trials"], resumed["trials"], strict=True):
        assert one["settings"] == other["settings"]
        assert one["heldout_nll"] == pytest.approx(other["heldout_nll"], rel=1e-6)


def test_trials_answer_questions_where_that_is_asked_for(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("evals.samples=1", "evals.max_new_tokens=2")
    over = ("--over", "train.learning_rate=1e-3")
    found = document(capsys, arguments(chat_rows, tiny_model, tmp_path / "sweep", *over, sets=asked))
    [trial] = found["trials"]
    assert len(json.loads((Path(trial["folder"]) / "record.json").read_text())["samples"]) == 1


def test_a_trial_that_diverges_is_listed_and_ends_nothing(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    found = document(capsys, arguments(chat_rows, tiny_model, out, "--over", "train.learning_rate=1e30,1e-3"))
    good, bad = found["trials"]
    assert (good["status"], bad["status"]) == ("finished", "failed")
    assert bad["reason"]
    assert found["best"] == good["name"]
    assert document(capsys, ["sweep", "--resume", "--out", str(out), "-q"])["trials"] == found["trials"]


def test_every_problem_of_a_grid_is_named_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sweep", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")]
    over = ["--over", "train.learning_rat=1e-3", "--over", "method.rank=0,4"]
    assert run([*given, *over]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'train.learning_rate'?" in said
    assert "rank" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_trials_in_one_pass_learn_what_they_learn_one_by_one(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that runs together with others, and one that cannot."""
    over = ["--over", "train.learning_rate=2e-3,1e-2", "--over", "method.name=lora,prompt-tuning"]
    given = [arguments(chat_rows, tiny_model, tmp_path / name, *over) for name in ("one", "several")]
    planned = document(capsys, [*given[1], "--dry-run"])
    assert planned["trials"] == 4
    assert all(trial["seconds"] > 0 and trial["bytes"] > 0 for trial in planned["shown"])
    at_once = {(t["settings"]["method.name"], t["together"]) for t in planned["shown"]}
    assert at_once == {("lora", 2), ("prompt-tuning", 1)}
    assert not (tmp_path / "several").exists()
    alone = document(capsys, [*given[0], "--together", "1"])
    together = document(capsys, given[1])
    by_name = {trial["name"]: trial for trial in alone["trials"]}
    for trial in together["trials"]:
        other = by_name[trial["name"]]
        assert trial["settings"] == other["settings"]
        assert trial["heldout_nll"] == pytest.approx(other["heldout_nll"], rel=5e-3)
        assert trial["trainable_parameters"] == other["trainable_parameters"]


def test_optuna_searches_ranges_and_goes_on_where_it_was(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "sweep"
    over = ["--over", "train.learning_rate=1e-3..5e-2:log", "--over", "method.rank=2..5"]
    search = ["--search", "optuna", "--trials", "4", "--together", "2"]
    whole = document(capsys, arguments(chat_rows, tiny_model, out, *over, *search))
    assert len(whole["trials"]) == 4
    for trial in whole["trials"]:
        assert 1e-3 <= trial["settings"]["train.learning_rate"] <= 5e-2
        assert trial["settings"]["method.rank"] in range(2, 6)
    for name in ("trial-003", "trial-004"):
        shutil.rmtree(out / "trials" / name)
    resumed = document(capsys, ["sweep", "--resume", "--out", str(out), "-q", "--trials", "5"])
    found = {t["name"]: t["settings"] for t in resumed["trials"]}
    assert found.pop("trial-005")
    assert found == {t["name"]: t["settings"] for t in whole["trials"]}
    shutil.rmtree(out / "trials" / "trial-005")
    again = document(capsys, ["sweep", "--resume", "--out", str(out), "-q"])
    assert len(again["trials"]) == 5, "how many were asked for last was not kept"


def test_seeds_are_compared_on_the_same_held_out_rows(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    recipe = tmp_path / "sweep-me.toml"
    recipe.write_text(
        '[sweep]\ntogether = 2\n[sweep.over]\ntrain.seed = [3, 4]\nbase.weights = ["dense", "int8"]\n',
        encoding="utf-8",
    )
    found = document(capsys, arguments(chat_rows, tiny_model, out, "--recipe", str(recipe)))
    records = [json.loads((Path(t["folder"]) / "record.json").read_text()) for t in found["trials"]]
    assert len(records) == 4
    assert len({record["heldout"]["nll_before"] for record in records}) == 2  # one for each form of the base
    assert len({trial["heldout_nll"] for trial in found["trials"]}) == 4
    assert all(trial["behind_best_interval"] for trial in found["trials"][1:])


def test_what_cannot_run_in_one_pass_after_all_is_trained_one_by_one(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that asks the tokens of the pass sees those of other adapters' rows, and says so."""
    colon = json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"][":"]
    over = ["--over", "train.learning_rate=1e-3,1e-2", "--method", "alora"]
    sets = (f"method.invocation=[{colon}]", "train.epochs=1")
    given = arguments(chat_rows, tiny_model, tmp_path / "sweep", *over, sets=sets)
    given.remove("-q")
    assert run(given) == 0
    assert "not trained together" in capsys.readouterr().err
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(trial["status"], trial["together"]) for trial in found["trials"]] == [("finished", 1)] * 2


def test_trials_that_differ_in_a_setting_of_the_process_are_apart(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = ["--over", "train.tokens_per_micro_batch=128,256", "--over", "method.rank=2,4,8"]
    given = [*arguments(chat_rows, tiny_model, tmp_path / "sweep", *over), "--dry-run"]
    planned = document(capsys, given)
    assert [trial["together"] for trial in planned["shown"]] == [3] * 6
    capped = document(capsys, [*given, "--together", "2"])
    assert sorted(trial["together"] for trial in capped["shown"]) == [1, 1, 2, 2, 2, 2]
    assert run([*given, "--together", "none"]) == 2
    assert "--together takes a number or auto" in capsys.readouterr().err


def test_a_trial_that_fits_nothing_is_named_by_the_plan_and_by_the_sweep(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = ["--over", "method.targets=q_proj,no_such_layer", "--set", "train.epochs=1"]
    found = document(capsys, arguments(chat_rows, tiny_model, tmp_path / "sweep", *over))
    assert [trial["status"] for trial in found["trials"]] == ["finished", "failed"]
    assert "no_such_layer" in found["trials"][1]["reason"]
