"""The held-out rows: how many, which, and that equal rows are never on both sides."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from addenda.data import Dataset, Split, read_dataset, split
from addenda.errors import ConfigError

Write = Callable[..., Path]


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(first, first + count)]


def prompts(side: object) -> list[str]:
    return [conversation.messages[0].content for conversation in side]


def halves(write: Write, data: list[dict[str, str]], **settings: object) -> tuple[Dataset, Split]:
    dataset = read_dataset(write(data))
    return dataset, split(dataset, **settings)


@pytest.mark.parametrize(
    ("count", "held", "note"),
    [
        (400, 40, "40 of 400 rows are held out (10%)"),
        (100, 20, "20 of 100 rows are held out (20%), because at least 20 rows are"),
        (40, 20, "20 of 40 rows are held out (50%), because at least 20 rows are"),
        (12, 6, "6 of 12 rows are held out (50%); that is few, so the held-out loss is uncertain"),
        (1, 0, "nothing is held out of 1 row: there is no held-out loss"),
    ],
)
def test_a_tenth_but_at_least_twenty_but_at_most_half(count: int, held: int, note: str, write: Write) -> None:
    dataset, parts = halves(write, rows(count))
    train, heldout = parts
    assert (len(train), len(heldout)) == (count - held, held)
    assert parts.note == note
    assert sorted(prompts(train) + prompts(heldout)) == sorted(prompts(dataset.conversations))


def test_copies_are_on_one_side(write: Write) -> None:
    rng = random.Random(0)
    data = rows(60) + [row for row in rows(60) for _ in range(rng.choice([0, 0, 1, 3]))]
    rng.shuffle(data)
    _, parts = halves(write, data)
    assert not set(prompts(parts.train)) & set(prompts(parts.heldout))
    assert len(parts.heldout) >= 20


def test_a_row_copied_too_often_to_hold_out_stays_in_training(write: Write) -> None:
    _, parts = halves(write, rows(1) * 90 + rows(10, first=1), seed=3)
    assert set(prompts(parts.train)) >= {"q0"}
    assert "q0" not in prompts(parts.heldout)
    assert len(parts.heldout) == 10


def test_the_choice_depends_on_seed_and_content_not_on_order(write: Write) -> None:
    data = rows(200)
    _, parts = halves(write, data)
    first = sorted(prompts(parts.heldout))
    random.Random(1).shuffle(data)
    _, parts = halves(write, data)
    assert sorted(prompts(parts.heldout)) == first
    _, parts = halves(write, data, seed=1)
    assert sorted(prompts(parts.heldout)) != first


def test_given_validation_rows_are_used_instead(write: Write, tmp_path: Path) -> None:
    other = write(rows(5, first=500), "other.jsonl")
    dataset = read_dataset(write(rows(50)), valid=other)
    parts = split(dataset)
    assert (len(parts.train), len(parts.heldout)) == (50, 5)
    assert parts.note == f"5 rows of '{other}' are held out"


@pytest.mark.parametrize("settings", [{"fraction": 0.0}, {"fraction": 0.6}, {"minimum": -1}])
def test_a_wrong_share_is_refused(settings: dict[str, float], write: Write) -> None:
    with pytest.raises(
        ConfigError, match=r"a split needs a fraction in \(0, 0.5\][\s\S]*hint: the default holds out"
    ):
        halves(write, rows(30), **settings)
