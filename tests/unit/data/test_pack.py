"""Packing loses nothing, keeps to the budget, and is the same every time."""

from __future__ import annotations

import math
import random

import pytest

from addenda.data import Example, RowRef, collate, epoch_order, plan_batches, plan_steps
from addenda.errors import ConfigError

ROW = RowRef("a.jsonl", 1, 0)
M = 2**64 - 1


def mixed(state: int) -> int:
    """SplitMix64 in Python's own integers."""
    state = (state + 0x9E3779B97F4A7C15) & M
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & M
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & M
    return state ^ (state >> 31)


def examples(rng: random.Random, count: int) -> list[Example]:
    out = []
    for index in range(count):
        length = rng.randint(1, 12)
        ids = tuple(rng.randrange(1000) for _ in range(length))
        out.append(Example(ids, tuple(rng.random() < 0.5 for _ in ids), RowRef("a.jsonl", index + 1, index)))
    return out


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_batch_within_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 5, 40, 90, 130]) for _ in range(rng.randint(1, 60))]
    batches = plan_batches(lengths, tokens_per_batch=100)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= 100 or len(batch) == 1


def test_batches_are_well_filled() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(20, 400) for _ in range(500)]
    batches = plan_batches(lengths, tokens_per_batch=2048)
    assert len(batches) <= math.ceil(sum(lengths) / 2048) + 1


def test_a_plan_over_a_part_uses_that_part() -> None:
    assert plan_batches([9, 2, 3, 4], tokens_per_batch=7, order=[1, 3]) == [[3, 1]]


def test_collate_aligns_targets_with_the_state_before_them() -> None:
    rng = random.Random(3)
    chosen = examples(rng, 30)
    batch = collate(chosen)
    wanted, start = [], 0
    for example in chosen:
        for i in range(1, len(example)):
            if example.trained[i]:
                wanted.append((start + i - 1, example.input_ids[i]))
        start += len(example)
    assert list(zip(batch.predict_from.tolist(), batch.targets.tolist(), strict=True)) == wanted
    assert batch.lengths == tuple(len(example) for example in chosen)
    assert batch.tokens == len(batch.input_ids) == start
    assert batch.trained_tokens == len(wanted)
    assert batch.rows == tuple(example.row for example in chosen)


def test_the_prompt_is_what_comes_before_the_first_trained_token() -> None:
    masks = [(False, False, True, False, True), (False, False), (True, False)]
    batch = collate([Example(tuple(range(len(on))), on, ROW) for on in masks])
    assert batch.prompts == (2, 2, 0)


def test_no_target_crosses_from_one_example_to_the_next() -> None:
    whole = Example((1, 2, 3), (True, True, True), ROW)
    batch = collate([whole, whole])
    assert batch.predict_from.tolist() == [0, 1, 3, 4]
    assert batch.targets.tolist() == [2, 3, 2, 3]


def test_a_batch_without_targets_is_empty_not_wrong() -> None:
    batch = collate([Example((1, 2), (False, False), ROW)])
    assert batch.trained_tokens == 0
    assert batch.targets.dtype == batch.input_ids.dtype


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40])
def test_an_epoch_is_a_permutation_of_its_own(seed: int) -> None:
    orders = [epoch_order(200, seed=seed, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(200, seed=seed, epoch=1) == orders[1]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 2), (-7, 1), (123456789, 40)])
def test_the_shuffle_is_the_published_generator(seed: int, epoch: int) -> None:
    start = mixed(mixed(seed & M) ^ epoch)
    wanted = sorted(range(50), key=lambda place: mixed((start + place) & M))
    assert epoch_order(50, seed=seed, epoch=epoch) == wanted


def test_the_shuffle_does_not_change_between_releases() -> None:
    """Another order would break resuming an older run."""
    assert epoch_order(8, seed=0, epoch=0) == [4, 0, 1, 7, 6, 2, 5, 3]
    assert epoch_order(8, seed=1, epoch=2) == [1, 3, 7, 2, 6, 4, 5, 0]


def test_no_place_is_favoured_by_the_shuffle() -> None:
    counts = [0] * 10
    for epoch in range(4000):
        counts[epoch_order(10, seed=11, epoch=epoch)[0]] += 1
    chi_squared = sum((count - 400) ** 2 / 400 for count in counts)
    assert chi_squared < 35  # 9 degrees of freedom: p > 5e-5


def test_steps_cover_the_epoch_in_its_order() -> None:
    lengths = [random.Random(n).randint(5, 60) for n in range(50)]
    steps = list(plan_steps(lengths, sequences_per_step=16, tokens_per_batch=128, seed=2, epoch=1))
    order = epoch_order(50, seed=2, epoch=1)
    members = [sorted(index for batch in step for index in batch) for step in steps]
    assert members == [sorted(order[at : at + 16]) for at in range(0, 50, 16)]


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens_per_batch must be at least 1, got 0[\s\S]*hint: 2048"):
        plan_batches([1], tokens_per_batch=0)
    with pytest.raises(ConfigError, match=r"sequences_per_step must be at least 1, got 0[\s\S]*hint: 16"):
        list(plan_steps([1], sequences_per_step=0, tokens_per_batch=1, seed=0, epoch=0))
