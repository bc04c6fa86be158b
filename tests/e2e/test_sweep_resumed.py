"""A trial's result is never told of other settings than those it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from addenda.cli.app import run


@pytest.mark.parametrize("cut_off", [False, True], ids=["finished", "cut off"])
def test_a_trial_that_was_begun_with_other_settings_is_run_anew(
    cut_off: bool, tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search may choose others when it goes on: a trial that failed for want of memory has a loss now."""
    out = tmp_path / "sweep"
    sets = ("train.epochs=1", "evals.samples=0", "base.dtype=float32", "train.batch_size=8")
    quick = [part for text in sets for part in ("--set", text)]
    given = ["sweep", str(chat_rows), "--base", str(tiny_model), "--out", str(out), "-q", *quick]
    assert run([*given, "--over", "method.rank=2,4", "--together", "1"]) == 0
    before = {t["name"]: t for t in json.loads((out / "sweep.json").read_text())["trials"]}
    if cut_off:
        (out / "trials" / "trial-001" / "heldout.json").unlink()
    recipe = out / "sweep.toml"
    recipe.write_text(recipe.read_text().replace("method.rank = [2, 4]", "method.rank = [3, 4]"))
    capsys.readouterr()
    assert run(["sweep", "--resume", "--out", str(out), "--json"]) == 0
    said = capsys.readouterr()
    after = {t["name"]: t for t in json.loads(said.out)["trials"]}
    assert after["trial-002"] == {**before["trial-002"], **_placed(after["trial-002"])}, "not run again"
    assert after["trial-001"]["settings"] == {"method.rank": 3}
    two, three = (found["trial-001"]["trainable_parameters"] for found in (before, after))
    assert three * 2 == two * 3, "trained with the rank that is told"
    assert "trial-001" in said.err
    assert "other settings" in said.err


def _placed(trial: dict[str, object]) -> dict[str, object]:
    """What depends on the other trials."""
    return {key: trial[key] for key in ("behind_best", "behind_best_interval", "worse_than_best")}
