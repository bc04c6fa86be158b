from __future__ import annotations

import random

import pytest

from addenda.data.rows import Example, RowRef
from addenda.train.batches import RowOrder, UsableRows
from addenda.train.config import TrainConfig


@pytest.mark.parametrize("trial", range(20))
def test_every_epoch_shows_every_row_once(trial):
    rows, size, epochs = random.randint(1, 60), random.randint(1, 70), random.randint(1, 4)
    order = RowOrder(rows, TrainConfig(epochs=epochs, batch_size=size, seed=trial))
    assert order.steps == epochs * order.steps_per_epoch
    for epoch in range(epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [row for step in steps for row in order.rows_of(step)]
        assert sorted(seen) == list(range(rows))
        assert all(len(order.rows_of(step)) == min(size, rows) for step in steps[:-1])


def test_order_depends_on_seed_and_epoch_alone():
    orders = {seed: RowOrder(50, TrainConfig(epochs=2, batch_size=50, seed=seed)) for seed in (3, 4)}
    shown = [orders[3].rows_of(0), orders[3].rows_of(1), orders[4].rows_of(0)]
    assert len(set(map(tuple, shown))) == 3
    assert RowOrder(50, TrainConfig(epochs=9, batch_size=10, seed=3)).rows_of(1) == shown[0][10:20]


def test_max_steps_cuts_the_run_but_never_lengthens_it():
    assert RowOrder(10, TrainConfig(epochs=2, batch_size=5, max_steps=3)).steps == 3
    assert RowOrder(10, TrainConfig(epochs=2, batch_size=5, max_steps=30)).steps == 4


def test_epochs_done_count_rows_not_steps():
    order = RowOrder(5, TrainConfig(epochs=2, batch_size=2))
    assert [order.epoch_of(step) for step in range(7)] == [0, 0.4, 0.8, 1, 1.4, 1.8, 2]


def test_evaluations_come_first_regularly_and_last():
    order = RowOrder(40, TrainConfig(epochs=2, batch_size=4, evals_per_epoch=2))
    assert [step for step in range(order.steps + 1) if order.evaluates_at(step)] == [0, 5, 10, 15, 20]
    odd = RowOrder(40, TrainConfig(epochs=1, batch_size=4, eval_every_steps=4))
    assert [step for step in range(odd.steps + 1) if odd.evaluates_at(step)] == [0, 4, 8, 10]


def example(ids, trained):
    return Example(tuple(ids), tuple(trained), RowRef("rows.jsonl", 1, 0))


def test_rows_without_a_target_are_passed_over_and_none_is_copied():
    silent, heard = (
        example([1, 2], [False, False]),
        [example([i, i, i], [False, True, i % 2 == 0]) for i in range(5)],
    )
    rows = UsableRows([silent, *heard[:2], silent, *heard[2:]])
    assert list(rows) == heard
    assert all(one is other for one, other in zip(rows, heard, strict=True))
    assert rows[1:3] == heard[1:3]
    assert (len(rows), rows.left_out, rows.longest) == (5, 2, 3)
    assert rows.sha256 == UsableRows(heard).sha256


def test_the_hash_of_rows_sees_every_token_mask_boundary_and_the_order():
    one, two = example([1, 2, 3], [False, True, True]), example([4, 5], [False, True])
    others = [
        [two, one],
        [one],
        [one, two, two],
        [example([1, 2, 4], one.trained), two],
        [example(one.input_ids, [False, True, False]), two],
        [example([1, 2, 3, 4, 5], [False, True, True, False, True])],
    ]
    digests = {UsableRows(rows).sha256 for rows in [[one, two], *others]}
    assert len(digests) == 7
