"""Did it learn or memorise: the change on held-out rows against the change on rows it was trained on.

The rule, on the nll per trained token of held-out rows and of as many training rows, base against adapted:

- **learned**: held-out rows became easier (the whole 95 % interval of the change is below zero), and the gain did not
  stay with the training rows.
- **memorising**: training rows became easier, but held-out rows did not, or kept less than half of the gain while the
  gap grew (its whole interval above zero).
- **nothing learned**: neither became easier beyond chance.
- **cannot tell**: too few rows on either side for an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from addenda.errors import DataError
from addenda.evals.results import HeldoutMetrics, RowScore
from addenda.intervals import Interval, interval_of_difference, interval_of_ratio, interval_of_share

__all__ = ["Learning", "compare", "compare_accuracy", "judge", "sample_rows"]

Verdict = Literal["learned", "memorising", "nothing learned", "cannot tell"]
Row = TypeVar("Row")
LEAST_TRANSFER = 0.5
"""Held-out rows must keep at least this share of the training rows' gain, or the rest counts as memorised."""


@dataclass(frozen=True)
class Learning:
    """The verdict and what it rests on. All intervals but the shares are in nats per trained token."""

    verdict: Verdict
    sentence: str
    """The verdict in plain words."""
    heldout_change: Interval
    """Held-out nll, adapted minus base, paired by row; below zero is better."""
    train_change: Interval
    """The same on a sample of training rows."""
    gap: Interval
    """Held-out minus train nll of the adapted model."""
    gap_growth: Interval
    """How much of that gap the training made: held-out change minus train change."""
    verbatim_heldout: Interval
    """Share in [0, 1] of held-out answers that the adapted model reproduces word for word by greedy decoding."""
    verbatim_train: Interval
    """The same on the sample of training rows."""


def compare(before: HeldoutMetrics, after: HeldoutMetrics, *, seed: int = 0) -> Interval:
    """Return nll per token after minus before with its 95 % interval, paired by row; below zero is better.

    Raises:
        DataError: the two were not measured on the same rows.

    Example:
        >>> base = HeldoutMetrics.of([RowScore(2.0 + i, 2, 0) for i in range(10)])
        >>> tuned = HeldoutMetrics.of([RowScore(1.0 + i, 2, 0) for i in range(10)])
        >>> compare(base, tuned).value
        -0.5
    """
    changes = _changes(before, after, lambda score: score.nll_sum)
    return interval_of_ratio(changes, _tokens(before), seed=seed)


def compare_accuracy(before: HeldoutMetrics, after: HeldoutMetrics, *, seed: int = 0) -> Interval:
    """Return token accuracy after minus before (a share) with its 95 % interval, paired by row; above zero is better.

    Raises:
        DataError: the two were not measured on the same rows.
    """
    changes = _changes(before, after, lambda score: score.correct)
    return interval_of_ratio(changes, _tokens(before), seed=seed)


def judge(
    heldout: tuple[HeldoutMetrics, HeldoutMetrics],
    train: tuple[HeldoutMetrics, HeldoutMetrics],
    *,
    seed: int = 0,
) -> Learning:
    """Judge by the rule above whether a run learned or memorised.

    Args:
        heldout: metrics of the base and of the adapted model on the held-out rows.
        train: the same on a sample of the rows it was trained on, about as many.
        seed: of the resampling.

    Raises:
        DataError: a pair was not measured on the same rows.
    """
    changes = [(_changes(*pair, lambda score: score.nll_sum), _tokens(pair[0])) for pair in (heldout, train)]
    heldout_change, train_change = (interval_of_ratio(*change, seed=seed) for change in changes)
    gap_growth = interval_of_difference(changes[0], changes[1], seed=seed)
    verdict = _verdict(heldout_change, train_change, gap_growth)
    return Learning(
        verdict=verdict,
        sentence=_sentence(verdict, heldout_change, train_change),
        heldout_change=heldout_change,
        train_change=train_change,
        gap=interval_of_difference(_nll(heldout[1]), _nll(train[1]), seed=seed),
        gap_growth=gap_growth,
        verbatim_heldout=_verbatim(heldout[1]),
        verbatim_train=_verbatim(train[1]),
    )


def sample_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` rows evenly spaced through `rows` (all when there are fewer), the same ones every time.

    Example:
        >>> sample_rows("abcdefgh", 4)
        ['a', 'c', 'e', 'g']
    """
    if count >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]


def _verdict(heldout: Interval, train: Interval, growth: Interval) -> Verdict:
    if heldout.low is None or train.low is None:
        return "cannot tell"
    if heldout.below_zero:
        kept = heldout.value / train.value if train.below_zero else 1.0
        return "memorising" if growth.above_zero and kept < LEAST_TRANSFER else "learned"
    return "memorising" if train.below_zero else "nothing learned"


def _sentence(verdict: Verdict, heldout: Interval, train: Interval) -> str:
    rows = f"{heldout.units} held-out rows"
    if verdict == "learned":
        return (
            f"On {rows} it was never shown, the adapted model predicts the right answer better than the base."
        )
    if verdict == "cannot tell":
        return "There are too few held-out or training rows to tell learning from chance."
    worse = "became harder" if heldout.above_zero else "did not become easier beyond chance"
    if verdict == "nothing learned":
        return f"Neither the rows it was trained on nor {rows} became easier; held-out rows {worse}."
    if heldout.below_zero:
        share = heldout.value / train.value
        return f"The gain stayed mostly with the rows it was trained on: {rows} kept {share:.0%} of it."
    return f"The rows it was trained on became easier, but {rows} {worse}."


def _changes(
    before: HeldoutMetrics, after: HeldoutMetrics, measure: Callable[[RowScore], float]
) -> list[float]:
    if _tokens(before) != _tokens(after):
        raise DataError(
            "before and after were measured on different rows",
            where={
                "before": f"{before.rows} rows, {before.tokens} tokens",
                "after": f"{after.rows} rows, {after.tokens} tokens",
            },
            hint="measure both on the same examples in the same order",
        )
    return [measure(new) - measure(old) for old, new in zip(before.per_row, after.per_row, strict=True)]


def _tokens(metrics: HeldoutMetrics) -> list[int]:
    return [score.tokens for score in metrics.per_row]


def _nll(metrics: HeldoutMetrics) -> tuple[list[float], list[int]]:
    return [score.nll_sum for score in metrics.per_row], _tokens(metrics)


def _verbatim(metrics: HeldoutMetrics) -> Interval:
    return interval_of_share(sum(score.verbatim for score in metrics.per_row), metrics.rows)
