"""A stored example comes back as it was."""

from __future__ import annotations

import random

import pytest

from addenda.data import Example, ExampleStore, RowRef


def test_examples_come_back_in_any_order() -> None:
    rng = random.Random(0)
    written = []
    store = ExampleStore()
    for index in range(200):
        ids = tuple(rng.randrange(2**31) for _ in range(rng.randint(1, 300)))
        example = Example(
            ids, tuple(rng.random() < 0.5 for _ in ids), RowRef(f"{index // 150}.jsonl", index + 3, index)
        )
        store.append(example)
        written.append(example)
        if index % 20 == 0:  # reading between writes does not disturb them
            assert store[index // 2] == written[index // 2]
    assert list(store) == written
    assert store[-1] == written[-1]
    assert store[10:20:3] == written[10:20:3]
    assert list(store.lengths) == [len(example) for example in written]
    assert store.tokens == sum(len(example) for example in written)
    with pytest.raises(IndexError, match="example 200 of 200"):
        store[200]
