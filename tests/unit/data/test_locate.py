"""A path leads back to its value, wherever it stands in the text."""

from __future__ import annotations

import json
import random

import pytest

from addenda.data.locate import find_value, line_and_column, nested_deeper, repeated_keys


def value(rng: random.Random, depth: int = 4) -> object:
    leaves = [None, True, 3, -2.5e-3, "", 'q"uote\\', "{[,]}:", "é\n😀"]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    keys = rng.sample(["a", "b c", 'k"', "é", "0", ""], rng.randint(0, 4))
    return {key: value(rng, depth - 1) for key in keys}


def paths(whole: object, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], object]]:
    inside = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ()
    return [(path, whole)] + [place for key, item in inside for place in paths(item, (*path, key))]


@pytest.mark.parametrize("seed", range(40))
def test_every_value_is_found(seed: int) -> None:
    rng = random.Random(seed)
    whole = value(rng)
    text = json.dumps(whole, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
    raw = text.encode()
    for path, wanted in paths(whole):
        after = raw[find_value(raw, path) :].decode()
        assert json.JSONDecoder().raw_decode(after)[0] == wanted


def test_a_path_that_does_not_exist_leads_to_what_does() -> None:
    raw = b'{"a": [1, {"b": 2}]}'
    assert raw[find_value(raw, ("a", 1, "zzz")) :] == b'{"b": 2}]}'
    assert find_value(raw, ("nothing",)) == 0


def test_line_and_column_count_characters() -> None:
    raw = '{\n "é😀": "x"}'.encode()
    offset = raw.index(b'"x"')
    assert line_and_column(raw, offset, line=10, column=4) == (11, 8)
    assert line_and_column(raw, 0, line=10, column=4) == (10, 4)


def test_repeated_keys_are_found_at_every_depth() -> None:
    raw = b'{"a": 1, "b": [{"c": 1, "c": 2, "c": 3}], "a": {"x": 1}}'
    found = sorted((path, key) for path, key, _ in repeated_keys(raw))
    assert found == [((), "a"), (("b", 0), "c")]


def test_depth_is_not_fooled_by_strings() -> None:
    assert nested_deeper(b'{"a": "[[[[[", "b": [1]}', 1) == 20
    assert nested_deeper(b'{"a": "[[[[[", "b": [1]}', 2) is None
    assert nested_deeper(b"[" * 100_000, 64) == 64
