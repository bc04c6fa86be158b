"""The verdict on learning and memorising, on made-up row scores whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from addenda.errors import DataError
from addenda.evals.overfitting import compare, compare_accuracy, judge, sample_rows
from addenda.evals.results import HeldoutMetrics, RowScore


def measured(nll_per_token: float, *, rows: int = 40, seed: int = 0, verbatim: int = 0) -> HeldoutMetrics:
    """Rows of 5 to 40 tokens whose nll per token scatters around the given one."""
    sizes = np.random.default_rng(7).integers(5, 40, rows)
    noise = np.random.default_rng(seed).normal(0, 0.1, rows)
    return HeldoutMetrics.of(
        [
            RowScore(
                float((nll_per_token + shift) * size),
                int(size),
                int(size) if index < verbatim else int(size) // 2,
            )
            for index, (size, shift) in enumerate(zip(sizes, noise, strict=True))
        ]
    )


def judged(heldout_after: float, train_after: float, **options: int) -> str:
    return judge(
        (measured(2.0, seed=1, **options), measured(heldout_after, seed=2, **options)),
        (measured(2.0, seed=3, **options), measured(train_after, seed=4, **options)),
    ).verdict


@pytest.mark.parametrize(
    ("heldout_after", "train_after", "verdict"),
    [
        (1.0, 0.8, "learned"),
        (1.2, 1.2, "learned"),
        (1.8, 0.2, "memorising"),
        (2.0, 0.5, "memorising"),
        (2.6, 0.1, "memorising"),
        (2.0, 2.0, "nothing learned"),
        (2.5, 2.5, "nothing learned"),
    ],
)
def test_verdict_follows_the_rule(heldout_after: float, train_after: float, verdict: str) -> None:
    assert judged(heldout_after, train_after) == verdict


def test_a_handful_of_rows_gives_no_verdict() -> None:
    assert judged(0.5, 0.2, rows=5) == "cannot tell"


def test_verdict_says_in_words_what_happened() -> None:
    def sentence(heldout_after: float, train_after: float) -> str:
        pairs = [(measured(2.0, seed=1), measured(after, seed=2)) for after in (heldout_after, train_after)]
        return judge(*pairs).sentence

    assert "40 held-out rows it was never shown" in sentence(1.0, 0.9)
    assert "kept 1" in sentence(1.8, 0.2)
    assert "% of it" in sentence(1.8, 0.2)
    assert "became harder" in sentence(2.6, 0.1)
    assert (
        "did not become easier beyond chance"
        in judge((measured(2.0), measured(2.0)), (measured(2.0), measured(1.0))).sentence
    )


def test_gap_and_its_growth_are_differences_of_means_per_token() -> None:
    learning = judge((measured(2.2), measured(1.0)), (measured(2.0), measured(0.4)))
    assert learning.gap.value == pytest.approx(0.6)
    assert learning.gap_growth.value == pytest.approx(-1.2 - -1.6)
    assert learning.heldout_change.value == pytest.approx(-1.2)
    assert learning.train_change.value == pytest.approx(-1.6)


def test_verbatim_shares_count_rows_whose_every_token_was_most_likely() -> None:
    learning = judge((measured(2.0), measured(1.0)), (measured(2.0), measured(1.0, verbatim=10)))
    assert learning.verbatim_train.value == 0.25
    assert learning.verbatim_heldout.value == 0.0
    assert learning.verbatim_heldout.high > 0.05


def test_paired_change_is_more_precise_than_an_unpaired_one() -> None:
    spread = np.random.default_rng(0).normal(3, 1, 50)
    before = HeldoutMetrics.of([RowScore(float(10 * nll), 10, 4) for nll in spread])
    after = HeldoutMetrics.of([RowScore(float(10 * nll - 2), 10, 6) for nll in spread])
    change = compare(before, after)
    assert change.value == pytest.approx(-0.2)
    assert change.high - change.low < 1e-6
    assert compare_accuracy(before, after).value == pytest.approx(0.2)


def test_comparing_different_rows_is_an_error_that_counts_both() -> None:
    with pytest.raises(DataError, match="different rows") as caught:
        compare(measured(2.0, rows=10), measured(1.0, rows=12))
    assert caught.value.where["before"].startswith("10 rows")
    assert "same examples in the same order" in caught.value.hint


def test_sampled_rows_are_spread_over_the_whole_set() -> None:
    assert sample_rows(range(100), 4) == [0, 25, 50, 75]
    assert sample_rows([1, 2], 9) == [1, 2]
    assert sample_rows([], 3) == []
