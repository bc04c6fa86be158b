"""Intervals: known values, coverage on synthetic data, and the cases without an interval."""

from __future__ import annotations

import numpy as np
import pytest

from addenda import intervals as interval
from addenda.intervals import (
    interval_of_difference,
    interval_of_mean,
    interval_of_ratio,
    interval_of_share,
)


def test_ratio_weighs_rows_by_their_tokens() -> None:
    amounts, weights = [1.0, 10.0] * 10, [1, 4] * 10
    assert interval_of_ratio(amounts, weights).value == pytest.approx(110 / 50, abs=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval, "RESAMPLES", 800)
    hits, trials = 0, 250
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(5, 80, 40)
        sums = rng.normal(1.5, 0.6, 40) * tokens
        found = interval_of_ratio(sums.tolist(), tokens.tolist(), seed=seed)
        hits += found.low <= 1.5 <= found.high
    assert 0.90 <= hits / trials <= 0.985


def test_few_skewed_rows_are_covered_better_than_by_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval, "RESAMPLES", 800)
    truth, hits, percentile_hits, trials = np.exp(0.5), 0, 0, 300
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        rows = rng.lognormal(0, 1, 20)
        found = interval_of_ratio(rows.tolist(), [1] * 20, seed=seed)
        means = rows[rng.integers(0, 20, (800, 20))].mean(1)
        hits += found.low <= truth <= found.high
        percentile_hits += np.quantile(means, 0.025) <= truth <= np.quantile(means, 0.975)
    assert hits / trials >= 0.88 > percentile_hits / trials


def test_difference_of_two_samples_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval, "RESAMPLES", 800)
    hits, trials = 0, 250
    for seed in range(trials):
        rng = np.random.default_rng(1000 + seed)
        pairs = []
        for mean in (2.0, 1.2):
            tokens = rng.integers(5, 80, 30)
            pairs.append(((rng.gamma(4, mean / 4, 30) * tokens).tolist(), tokens.tolist()))
        found = interval_of_difference(*pairs, seed=seed)
        hits += found.low <= 0.8 <= found.high
    assert 0.90 <= hits / trials <= 0.985


def test_interval_narrows_with_the_square_root_of_the_rows() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for rows in (100, 1600):
        found = interval_of_ratio(rng.normal(0, 1, rows).tolist(), [1] * rows)
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_same_seed_gives_the_same_interval_and_another_seed_nearly_the_same() -> None:
    amounts = np.random.default_rng(5).gamma(2, 1, 60).tolist()
    first, again, other = (interval_of_ratio(amounts, [1] * 60, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert other.low == pytest.approx(first.low, rel=0.05)


def test_too_few_rows_give_an_estimate_without_an_interval() -> None:
    few = interval_of_ratio([1.0, 2.0, 4.0], [1, 1, 1])
    assert few.value == pytest.approx(7 / 3)
    assert few.low is None
    assert few.high is None
    assert not few.below_zero
    assert not few.above_zero
    assert interval_of_difference(([1.0] * 20, [1] * 20), ([1.0] * 3, [1] * 3)).low is None


def test_equal_rows_give_an_interval_of_no_width() -> None:
    same = interval_of_ratio([0.0] * 12, [3] * 12)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    tenth = interval_of_ratio([0.3] * 12, [3] * 12)
    assert tenth.low == tenth.high == pytest.approx(0.1)


def test_many_rows_are_drawn_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = np.random.default_rng(7).normal(1, 1, 50).tolist()
    whole = interval_of_ratio(amounts, [1] * 50)
    monkeypatch.setattr(interval, "_CELLS_AT_ONCE", 50 * 33)
    assert interval_of_ratio(amounts, [1] * 50) == whole


def test_share_matches_wilsons_formula_and_stays_in_the_unit_range() -> None:
    half = interval_of_share(10, 20)
    assert (round(half.low, 4), round(half.high, 4)) == (0.2993, 0.7007)
    assert interval_of_share(0, 20).low == 0.0
    assert interval_of_share(20, 20).high == 1.0


@pytest.mark.parametrize(("amounts", "weights"), [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [1, 0])])
def test_unusable_rows_are_refused(amounts: list[float], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="as many positive weights as amounts"):
        interval_of_ratio(amounts, weights)


@pytest.mark.parametrize(("hits", "units"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_shares_are_refused(hits: int, units: int) -> None:
    with pytest.raises(ValueError, match="0 <= hits <= units"):
        interval_of_share(hits, units)


def test_students_interval_of_a_few_values_covers_their_mean_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(11)
    for count in (2, 3, 6):
        draws = rng.normal(3.0, 2.0, (400, count))
        known = [interval_of_mean(values.tolist()) for values in draws]
        hits = sum(one.low <= 3.0 <= one.high for one in known) / len(known)
        assert hits == pytest.approx(0.95, abs=0.04), count
    same = interval_of_mean([0.25] * 5)
    assert (same.value, same.low, same.high, same.units) == (0.25, 0.25, 0.25, 5)
    assert interval_of_mean([1.5]).low is None
    with pytest.raises(ValueError, match="at least one"):
        interval_of_mean([])
