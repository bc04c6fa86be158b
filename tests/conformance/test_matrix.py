"""The table of methods and places says what is declared, and what a run found."""

from __future__ import annotations

import pytest

from addenda.conformance.cases import on_layers
from addenda.conformance.layers import LAYERS
from addenda.conformance.matrix import cases_of, matrix, refusals
from addenda.conformance.models import MODELS
from addenda.core import registry

PLACES = [*LAYERS, *MODELS]


def marks(name: str, table: str) -> dict[str, str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    labels = next(line for line in table.splitlines() if line.strip().startswith("a b"))
    start = labels.index("a")
    return {place: line[start + 2 * at : start + 2 * at + 1].strip() for at, place in enumerate(PLACES)}


def test_what_is_declared_is_marked_and_a_refusal_has_a_reason() -> None:
    found = marks("bottleneck", matrix(registry.names()))
    assert (found["linear"], found["conv2d"], found["lstm"], found["llama"]) == ("+", "/", "-", "")
    assert marks("lily", matrix(["lily"]))["linear"] == "*"
    assert marks("prompt-tuning", matrix(["prompt-tuning"]))["bert"] == "*"
    reasons = refusals("bottleneck")
    assert ["lstm", "gru"] in reasons.values()
    assert sorted(place for places in reasons.values() for place in places) == sorted(
        place for place, mark in found.items() if mark == "-"
    )


def test_what_a_run_found_is_marked() -> None:
    table = matrix(["lora"], failed={("lora", "linear")}, passed={("lora", "linear"), ("lora", "conv2d")})
    found = marks("lora", table)
    assert (found["linear"], found["conv2d"], found["conv1d"], found["block"]) == ("F", "+", ".", "-")
    assert "F  a property fails" in table


@pytest.mark.parametrize("name", registry.names())
def test_every_variant_of_every_method_stands_somewhere(name: str) -> None:
    stands = {case.variant for case in cases_of(name) if case.refusal is None}
    assert stands == set(range(len(registry.get(name).variants)))


def test_a_method_on_layers_is_tried_on_all_of_them() -> None:
    cases = on_layers("lora")
    assert {case.place for case in cases} == set(LAYERS)
    assert len({case.id for case in cases}) == len(cases) == len(LAYERS) * len(registry.get("lora").variants)
