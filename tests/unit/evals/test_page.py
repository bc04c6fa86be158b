"""The building blocks escape what they are given and write numbers with units."""

from __future__ import annotations

import math

import pytest

from addenda.evals.page import (
    LONGEST_TEXT,
    MINUS,
    NBSP,
    Html,
    bytes_of,
    count,
    duration,
    escape,
    interval_text,
    prose,
    signed,
    table,
    tag,
)
from addenda.intervals import Interval


def test_tag_escapes_children_and_attributes_but_not_markup() -> None:
    made = tag("p", "<script>", Html("<b>"), title='"><script>')
    assert made == '<p title="&quot;&gt;&lt;script&gt;">&lt;script&gt;<b></p>'


def test_control_characters_and_surrogates_become_visible_marks() -> None:
    shown = escape("a\x00b\x1b[31m\ud800c\n\td")
    assert shown == "a\ufffdb\ufffd[31m\ufffdc\n\td"
    shown.encode("utf-8")


def test_attributes_of_none_are_left_out_and_names_get_hyphens() -> None:
    assert tag("text", "x", text_anchor="end", class_=None) == '<text text-anchor="end">x</text>'


def test_long_text_is_cut_and_the_rest_counted() -> None:
    shown = prose("x" * (LONGEST_TEXT + 1234))
    assert shown.count("x") == LONGEST_TEXT
    assert "1,234 more characters" in shown


def test_empty_answer_is_said_to_be_empty() -> None:
    assert "(empty)" in prose(" \n")


def test_table_marks_row_and_column_headings_and_can_be_reached_by_keyboard() -> None:
    made = table("Costs", ["name", "value"], [["a<b", "1"]], numeric=(1,))
    assert '<th scope="row">a&lt;b</th><td class="number">1</td>' in made
    assert made.count('scope="col"') == 2
    assert 'tabindex="0"' in made
    assert 'aria-label="Costs"' in made
    assert "<thead>" not in table("Facts", ["", ""], [["a", "b"]])


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999_bytes"), (1000, "1_kB"), (19_440_000, "19.4_MB"), (1.184e9, "1.18_GB"), (0, "0_bytes")],
)
def test_sizes_are_written_in_decimal_units(number: float, text: str) -> None:
    assert bytes_of(number) == text.replace("_", NBSP)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3_s"), (9.94, "9.9_s"), (59.6, "1_min 0_s"), (231.4, "3_min 51_s"), (3600, "1_h 0_min")],
)
def test_durations_are_written_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text.replace("_", NBSP)


def test_signs_are_kept_apart_from_zero() -> None:
    assert signed(-1.5, 1) == f"{MINUS}1.5"
    assert signed(-0.0004) == signed(0.0) == "0.000"
    assert count(-12345.4) == f"{MINUS}12,345"


def test_interval_says_why_it_is_missing() -> None:
    assert interval_text(Interval(1.0, None, None, 3)) == "no interval: only 3 units"
    assert interval_text(Interval(-1.0, -2.0, math.pi, 9), digits=1) == f"95% interval {MINUS}2.0 to +3.1"
