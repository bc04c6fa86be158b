"""Equal rows are found, whatever their order and spelling."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from addenda.data import read_dataset
from addenda.data.duplicates import groups, repeats, shared


def test_groups_agree_with_a_dictionary() -> None:
    rng = random.Random(0)
    # Few distinct halves, so that rows often agree in one half only.
    rows = [rng.choice([b"a" * 8, b"b" * 8, b"c" * 8]) + rng.choice([b"x" * 8, b"y" * 8]) for _ in range(300)]
    first: dict[bytes, int] = {}
    wanted = [first.setdefault(row, index) for index, row in enumerate(rows)]
    assert groups(b"".join(rows)).tolist() == wanted
    assert list(repeats(b"".join(rows))) == [(i, w) for i, w in enumerate(wanted) if i != w]
    assert list(repeats(b"")) == []


def test_shared_rows_are_those_in_both() -> None:
    one, two = [bytes([n]) * 16 for n in range(20)], [bytes([n]) * 16 for n in (5, 40, 7, 41, 5)]
    assert shared(b"".join(one), b"".join(two)) == [0, 2, 4]


def test_a_copy_in_other_words_of_json_is_a_copy(write: Callable[..., Path]) -> None:
    body = b'{"prompt": "a", "completion": "b"}\n'
    body += b'{ "completion":"b",\t"prompt":"\\u0061" }\n'
    body += b'{"prompt": "a", "completion": "c"}\n'
    dataset = read_dataset(write(body))
    (copy,) = [finding for finding in dataset.report if finding.code == "duplicate_row"]
    assert (copy.line, copy.found) == (2, "the same as line 1")
