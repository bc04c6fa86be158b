"""The trials of a sweep: what each tried, what became of it, and which is best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.evals.overfitting import compare
from addenda.evals.results import HeldoutMetrics, RowScore
from addenda.intervals import Interval, interval_of_ratio
from addenda.recipe.folder import SUMMARY, write_json
from addenda.sweeps.space import Point

__all__ = ["Outcome", "Standing", "Trial", "read_outcome", "standings"]

HELDOUT, FAILED = "heldout.json", "failed.json"


@dataclass(frozen=True)
class Trial:
    """One choice of settings in a sweep."""

    name: str
    """``trial-001`` and so on; the name of its folder and of its adapter."""
    point: Point
    folder: Path
    """Where it is run."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: how it fared on the held-out rows, or why it ended."""

    trial: Trial
    heldout: HeldoutMetrics | None
    figures: Mapping[str, Any]
    """The content of its ``summary.json``; empty where it ended early."""
    reason: str = ""
    """Why it ended early."""
    again: bool = False
    """Whether a resumed sweep tries it again: it ended by something that another attempt may not meet."""

    @property
    def nll(self) -> Interval | None:
        """Held-out nll in nats per trained token, with its interval over the rows."""
        if self.heldout is None:
            return None
        rows = self.heldout.per_row
        return interval_of_ratio([row.nll_sum for row in rows], [row.tokens for row in rows])

    @property
    def loss(self) -> float | None:
        """Held-out nll in nats per trained token; None where it ended early."""
        return None if self.heldout is None else self.heldout.nll_per_token

    def write(self) -> None:
        """Leave in the trial's folder what a resumed sweep reads."""
        if self.heldout is None:
            write_json(self.trial.folder / FAILED, {"reason": self.reason, "again": self.again})
        else:
            rows = self.heldout.per_row
            columns = {name: [getattr(row, name) for row in rows] for name in RowScore._fields}
            write_json(self.trial.folder / HELDOUT, columns)


def read_outcome(trial: Trial) -> Outcome | None:
    """Return what a trial's folder says became of it; None where it is still to be run."""
    held, failed = trial.folder / HELDOUT, trial.folder / FAILED
    if held.is_file():
        columns = json.loads(held.read_text(encoding="utf-8"))
        scores = [RowScore(*row) for row in zip(*(columns[name] for name in RowScore._fields), strict=True)]
        figures = json.loads((trial.folder / SUMMARY).read_text(encoding="utf-8"))
        return Outcome(trial, HeldoutMetrics.of(scores), figures)
    if failed.is_file():
        found = json.loads(failed.read_text(encoding="utf-8"))
        return None if found["again"] else Outcome(trial, None, {}, found["reason"])
    return None


@dataclass(frozen=True)
class Standing:
    """One trial in the order of the sweep, best first."""

    outcome: Outcome
    nll: Interval | None
    """Held-out nll in nats per trained token; None for a trial that ended early."""
    behind: Interval | None
    """How much higher its nll is than the best one's, paired by row; None for the best and where there is none."""

    @property
    def worse_than_best(self) -> bool:
        """Whether the difference to the best one is more than chance: its whole interval lies above zero."""
        return self.behind is not None and self.behind.above_zero

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        trial = self.outcome.trial
        return {
            "name": trial.name,
            "folder": str(trial.folder),
            "settings": dict(trial.point),
            "status": "failed" if self.nll is None else "finished",
            "reason": self.outcome.reason,
            "heldout_nll": self.nll and self.nll.value,
            "heldout_nll_interval": _ends(self.nll),
            "behind_best": self.behind and self.behind.value,
            "behind_best_interval": _ends(self.behind),
            "worse_than_best": self.worse_than_best,
            "trainable_parameters": self.outcome.figures.get("trainable_parameters"),
            "best_step": self.outcome.figures.get("best_step"),
            "train_seconds": self.outcome.figures.get("train_seconds"),
            "together": self.outcome.figures.get("together"),
        }


def standings(outcomes: Sequence[Outcome]) -> list[Standing]:
    """Order trials by held-out nll, lowest first; those that ended early come last, in the order they were run.

    Raises:
        DataError: two trials were not measured on the same rows.
    """
    finished = [outcome for outcome in outcomes if outcome.heldout is not None]
    finished.sort(key=lambda outcome: outcome.loss or 0.0)
    found = [
        Standing(outcome, outcome.nll, None if outcome is finished[0] else _behind(finished[0], outcome))
        for outcome in finished
    ]
    return found + [Standing(outcome, None, None) for outcome in outcomes if outcome.heldout is None]


def _behind(best: Outcome, other: Outcome) -> Interval:
    assert best.heldout is not None
    assert other.heldout is not None
    return compare(best.heldout, other.heldout)


def _ends(known: Interval | None) -> list[float] | None:
    if known is None or known.low is None or known.high is None:
        return None
    return [known.low, known.high]
