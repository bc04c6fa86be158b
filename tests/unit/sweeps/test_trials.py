"""Which trial is best, and whether the others are worse by more than chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from addenda.errors import DataError
from addenda.evals.results import HeldoutMetrics, RowScore
from addenda.sweeps.trials import Outcome, Trial, read_outcome, standings


def outcome(folder: Path, name: str, sums: np.ndarray | None, tokens: np.ndarray) -> Outcome:
    trial = Trial(name, {"method.rank": 4}, folder / name)
    if sums is None:
        return Outcome(trial, None, {}, "it diverged")
    rows = [RowScore(float(nll), int(count), 0) for nll, count in zip(sums, tokens, strict=True)]
    return Outcome(trial, HeldoutMetrics.of(rows), {"trainable_parameters": 3})


def test_trials_are_ordered_by_loss_and_compared_row_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    tokens = rng.integers(1, 20, 60)
    sums = tokens * rng.uniform(1.0, 5.0, 60)  # rows differ by far more than the trials do
    best = outcome(tmp_path, "best", sums, tokens)
    close = outcome(tmp_path, "close", sums + tokens * rng.choice([-0.3, 0.301], 60), tokens)
    worse = outcome(tmp_path, "worse", sums + tokens * rng.uniform(0.08, 0.12, 60), tokens)
    lost = outcome(tmp_path, "lost", None, tokens)
    found = standings([lost, worse, best])
    assert [one.outcome for one in found] == [best, worse, lost]
    assert found[1].worse_than_best, "every row is harder, if only by a little"
    assert found[1].behind is not None
    assert found[1].behind.value == pytest.approx(worse.heldout.nll_per_token - best.heldout.nll_per_token)
    low, high = found[1].nll.low, found[1].nll.high
    assert low < found[0].nll.value < high, "seen by itself it could not be told apart"
    assert not found[2].worse_than_best
    assert found[2].document()["reason"] == "it diverged"
    assert not standings([best, close])[1].worse_than_best


def test_an_outcome_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    tokens = np.arange(1, 12)
    done = outcome(tmp_path, "done", np.sqrt(tokens), tokens)
    done.trial.folder.mkdir()
    assert read_outcome(done.trial) is None
    done.write()
    (done.trial.folder / "summary.json").write_text('{"trainable_parameters": 3}')
    assert read_outcome(done.trial) == done
    lost = outcome(tmp_path, "lost", None, tokens)
    lost.trial.folder.mkdir()
    lost.write()
    assert read_outcome(lost.trial) == lost
    Outcome(lost.trial, None, {}, "the disk was full", again=True).write()
    assert read_outcome(lost.trial) is None, "it is tried again"


def test_trials_on_other_rows_are_not_compared(tmp_path: Path) -> None:
    one = outcome(tmp_path, "one", np.ones(9), np.ones(9, int))
    other = outcome(tmp_path, "other", np.ones(10), np.ones(10, int))
    with pytest.raises(DataError):
        standings([one, other])
