"""The benchmark of methods: what it compares, how it tunes, and how it sums up."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from addenda.core import registry, starts

FOLDER = Path(__file__).parents[2] / "benchmarks" / "methods_quality"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of the benchmark as its script does, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        for own in ("tuning", "contenders", "table"):
            monkeypatch.delitem(sys.modules, own, raising=False)
        return importlib.import_module(name)

    return load


def test_every_method_is_compared_or_left_out_for_a_reason(module: Callable[[str], ModuleType]) -> None:
    contenders = module("contenders")
    every = [*contenders.contenders("banking77"), *contenders.contenders("gsm8k")]
    compared = {each.method for each in every} - {contenders.HEAD_ONLY}
    assert compared | set(contenders.LEFT_OUT) == set(registry.names())
    assert not compared & set(contenders.LEFT_OUT)
    begun = {each.settings.get("start", "kaiming") for each in every if each.method == "lora"}
    assert begun | set(contenders.STARTS_LEFT_OUT) == set(starts.names())
    assert not begun & set(contenders.STARTS_LEFT_OUT)


@pytest.mark.parametrize("task", ["banking77", "gsm8k"])
def test_every_contender_can_be_made_and_names_are_unique(
    module: Callable[[str], ModuleType], task: str
) -> None:
    contenders = module("contenders")
    every = contenders.contenders(task)
    names = [each.name for each in every]
    assert len(names) == len(set(names))
    for each in every:
        if each.method != contenders.HEAD_ONLY:
            assert each.made().name == each.method
            assert each.learning_rate() > 0


@pytest.mark.parametrize("seed", range(20))
def test_tuning_finds_the_lowest_point_of_a_valley_and_tries_both_its_sides(
    module: Callable[[str], ModuleType], seed: int
) -> None:
    tuning, draw = module("tuning"), random.Random(seed)
    lowest, broken_above = draw.uniform(-5.5, 0.5), draw.uniform(0.2, 3.0)
    losses: dict[float, float] = {}
    first = 10 ** draw.uniform(-5.0, lowest + broken_above)
    while (rate := tuning.next_rate(losses, first=first)) is not None:
        assert rate not in losses
        distance = math.log10(rate) - lowest
        losses[rate] = math.nan if distance > broken_above else distance**2
    best = tuning.best_rate(losses)
    assert abs(math.log10(best) - lowest) <= 0.26  # half a step of the grid
    tried = sorted(losses)
    assert tried[0] < best < tried[-1]


def test_tuning_ends_where_every_run_fails(module: Callable[[str], ModuleType]) -> None:
    tuning = module("tuning")
    losses: dict[float, float] = {}
    while (rate := tuning.next_rate(losses, first=random.uniform(1e-5, 1.0))) is not None:
        losses[rate] = math.nan
    assert min(losses) <= 1e-6
    assert tuning.best_rate(losses) is None


def test_the_interval_is_students(module: Callable[[str], ModuleType]) -> None:
    table, values = module("table"), [random.random() for _ in range(3)]
    mean, half = table.interval(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3)
    # For two degrees of freedom Student's distribution has a closed form: t = (2p - 1) sqrt(2 / (4p (1 - p))).
    assert half == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) * error, rel=1e-3)


def test_the_table_compares_runs_of_one_seed_and_names_what_is_missing(
    module: Callable[[str], ModuleType],
) -> None:
    table = module("table")
    gain = random.uniform(0.01, 0.1)

    def run(name: str, part: str, seed: int, accuracy: float, **more: float) -> dict[str, object]:
        figures = {"parameters": 5, "cpu_seconds": 1.0, "attach_seconds": 0.0, "peak_bytes": 10**6}
        about = {"settings": {"rank": 8}, "default_rate": 1e-3, "rate": 1e-3, "nll": 1.0, "cosine": 1.0}
        known = {"name": name, "part": part, "seed": seed, "accuracy": accuracy, "spearman": 1.0}
        return {**figures, **about, **known, **more}

    runs = [run(name, "validation", 0, 0.5) for name in ("lora", "dora")]
    for seed in (1, 2, 3):
        level = random.random() / 2
        runs += [run("lora", "test", seed, level), run("dora", "test", seed, level + gain)]
        runs.append(run("dora", "test", seed, 0.0, rate=3e-3))  # of a rate that is not the best
    text = table.render("banking77", runs, ["lora", "dora", "vera"])
    first, second = [line for line in text.splitlines() if "rank 8" in line]
    assert first.startswith("| dora")  # the better one first
    assert f"+{100 * gain:.1f} ± 0.0" in first
    assert second.startswith("| lora")
    assert "Not measured yet: vera." in text
