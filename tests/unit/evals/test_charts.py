"""Charts put points where the numbers are, and their axes around them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from addenda.evals.charts import MOST_POINTS, Series, bar, line_chart, ticks, whisker_chart
from addenda.intervals import Interval


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 47.0, 1e6])
def test_ticks_span_the_data_in_even_round_steps(scale: float) -> None:
    rng = np.random.default_rng(int(scale))
    for _ in range(50):
        low, high = sorted(rng.normal(0, scale, 2).tolist())
        marks = ticks(low, high)
        assert marks[0] <= low + 1e-9 * scale
        assert marks[-1] >= high - 1e-9 * scale
        assert 2 <= len(marks) <= 8
        assert np.allclose(np.diff(marks), marks[1] - marks[0])


def test_ticks_of_steps_are_whole_numbers() -> None:
    assert ticks(0, 3, 6, least_step=1) == [0, 1, 2, 3]


def test_ticks_of_a_single_value_still_make_an_axis() -> None:
    for value in (0.0, 2.5, -3.0):
        marks = ticks(value, value)
        assert marks[0] <= value <= marks[-1]
        assert marks[0] < marks[-1]


def chart(*series: Series) -> str:
    return line_chart(series, title="Loss", x_label="steps", y_label="nats", mark=(2, "kept"))


def test_higher_values_are_drawn_higher_and_later_ones_further_right() -> None:
    drawn = chart(Series("held-out", "heldout", ((0, 3.0), (1, 2.0), (2, 1.0))))
    points = re.search(r'<polyline points="([^"]+)"', drawn).group(1)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.2)


def test_chart_names_its_axes_its_lines_and_itself() -> None:
    drawn = chart(
        Series("training", "train", ((0, 1.0),)), Series("held-out", "heldout", ((0, 1.2), (4, 0.9)))
    )
    for words in (
        "<title>Loss</title>",
        ">steps</text>",
        ">nats</text>",
        ">training</text>",
        ">held-out</text>",
    ):
        assert words in drawn
    assert 'role="img"' in drawn
    assert ">kept</text>" in drawn


def test_long_series_are_thinned_to_means_and_say_so() -> None:
    series = Series("training", "train", tuple((i, float(i % 2)) for i in range(2000)))
    thin = series.thinned()
    assert len(thin) <= MOST_POINTS
    assert {y for _, y in thin} == {0.5}
    assert "(mean of 10 steps)" in chart(series)


def test_whiskers_reach_from_end_to_end_and_unknown_ones_are_left_out() -> None:
    rows = [
        ("known", Interval(-1.0, -2.0, 0.0, 20), "heldout"),
        ("unknown", Interval(1.0, None, None, 3), "train"),
    ]
    drawn = whisker_chart(rows, title="Changes", x_label="nats")
    whisker = re.findall(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)" y2="[\d.]+" class="whisker', drawn)
    zero = float(re.search(r'<line x1="([\d.]+)"[^>]+class="zero"', drawn).group(1))
    assert len(whisker) == 1
    assert float(whisker[0][1]) == zero
    assert float(whisker[0][0]) < zero


def test_bar_fills_its_share_and_no_more() -> None:
    assert 'width="25.0"' in bar(0.25)
    assert 'width="100.0"' in bar(7.0)
