"""What a sweep is over: how it is spelled, what is refused, and which recipes come of it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from addenda.errors import ConfigError, MissingDependencyError
from addenda.settings import resolve
from addenda.sweeps.runner import Sweep
from addenda.sweeps.search import Grid, OptunaSearch
from addenda.sweeps.space import Choices, Range, Source, grid, parse_axes, recipes_of, shown
from addenda.toml import toml_value


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("method.rank=4,16", (4, 16)),
        ("train.learning_rate=1e-4, 3e-4", (1e-4, 3e-4)),
        ("method.name=lora,ia3", ("lora", "ia3")),
        ("train.betas=[0.9, 0.99],[0.8, 0.9]", ([0.9, 0.99], [0.8, 0.9])),
        ('method.targets="a,b","c"', ("a,b", "c")),
        ("method.bias=true,false", (True, False)),
        ("base.dtype=float32", ("float32",)),
        ("method.note=../x,y", ("../x", "y")),
    ],
)
def test_values_are_spelled_as_for_set(text: str, values: tuple[object, ...]) -> None:
    assert parse_axes([text]) == [Choices(text.partition("=")[0], values)]


@pytest.mark.parametrize(
    ("text", "low", "high", "log"),
    [
        ("1e-5..1e-2:log", 1e-5, 1e-2, True),
        ("2..8", 2, 8, False),
        ("0.5..1.5", 0.5, 1.5, False),
        ("-1..1", -1, 1, False),
    ],
)
def test_a_range_has_two_ends_and_says_whether_it_is_logarithmic(
    text: str, low: float, high: float, log: bool
) -> None:
    [axis] = parse_axes([f"a.b={text}"])
    assert axis == Range("a.b", low, high, log=log)
    assert axis.whole == (isinstance(low, int) and isinstance(high, int))
    assert parse_axes([str(axis)]) == [axis]


def test_a_table_says_the_same_and_the_command_line_wins() -> None:
    table = {"train": {"learning_rate": "1e-4..1e-2:log"}, "method.rank": [4, 8], "train.epochs": 2}
    assert parse_axes([], table) == [
        Range("train.learning_rate", 1e-4, 1e-2, log=True),
        Choices("method.rank", (4, 8)),
        Choices("train.epochs", (2,)),
    ]
    assert Choices("method.rank", (2,)) in parse_axes(["method.rank=2"], table)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "nothing to sweep over"),
        (["method.rank"], "--over takes section.key=value,value"),
        (["method.rank="], "no value is given"),
        (["method.rank=4,4"], "4 is given twice"),
        (["method.rank=4", "method.rank=8"], "given twice"),
        (["method.rank=8..4"], "must rise"),
        (["train.learning_rate=0..1:log"], "begin above 0"),
        (["data.max_tokens=64,128"], "what the held-out loss is measured on"),
        (["base.source=a,b"], "cannot be compared"),
        (["out=a,b"], "its own folder"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_the_reason(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_axes(texts)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_axes(["method.rank=4,4", "name=a", "x"])
    assert set(caught.value.where) == {"method.rank", "name", "x"}
    with pytest.raises(ConfigError) as caught:
        recipes_of(
            Source({}), grid(parse_axes(["method.rank=0,4", "train.learning_rat=1e-3", "train.epochs=-1,1"]))
        )
    assert "did you mean 'train.learning_rate'?" in str(caught.value)
    assert "rank must be" in str(caught.value)
    assert "epochs must be" in str(caught.value)


def test_a_grid_holds_every_combination_once() -> None:
    rng = random.Random()
    axes = [Choices(f"s.{letter}", tuple(rng.sample(range(100), rng.randint(1, 4)))) for letter in "abc"]
    points = grid(axes)
    assert {tuple(point.values()) for point in points} == set(itertools.product(*(a.values for a in axes)))
    assert len({shown(point) for point in points}) == len(points)
    search = Grid(axes)
    assert (search.total, search.ask(), search.ask()) == (len(points), points, [])


def test_each_recipe_is_the_given_one_but_for_its_point_and_the_held_out_rows_stay() -> None:
    source = Source({"sets": ["train.seed=5", "train.epochs=2"]})
    points = grid(parse_axes(["train.seed=1,2", "method.rank=4"]))
    for point, recipe in zip(points, recipes_of(source, points), strict=True):
        wanted = resolve(sets=["train.epochs=2", "data.heldout_seed=5", *shown(point).split()])
        assert recipe == wanted
        assert str(recipe.origin("method.rank")) == "sweep"
    assert source.recipe({"method.rank": 4}).data.heldout_seed is None


def test_a_sweep_is_read_back_from_the_recipe_it_writes(tmp_path: Path) -> None:
    from addenda.toml import read_table

    axes = parse_axes(["train.learning_rate=1e-5..1e-2:log", "method.rank=2..8", "method.bias=true,false"])
    source = Source(
        {"sets": ["train.epochs=2", "method.targets=[q_proj]"], "flags": {"data.path": "x y.jsonl"}}
    )
    file = tmp_path / "sweep.toml"
    file.write_text(Sweep(source, axes, "optuna", trials=7, together=2).to_toml(), encoding="utf-8")
    held = read_table(file, "sweep")
    assert parse_axes([], held.pop("over")) == axes
    assert held == {"search": "optuna", "trials": 7, "together": 2}
    point = {"train.learning_rate": 1e-3, "method.rank": 2, "method.bias": True}
    assert Source({"file": file}).recipe(point) == source.recipe(point)
    with pytest.raises(ConfigError, match="only 'addenda sweep' reads"):
        resolve(file=file)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search": "random"}, "grid or optuna"),
        ({"trials": 3}, "as many trials as its values"),
        ({"search": "optuna", "trials": 0}, "trials must be a whole number"),
        ({"together": "two"}, "together must be a whole number"),
    ],
)
def test_settings_of_the_sweep_itself_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sweep(Source({}), parse_axes(["method.rank=4"]), **settings)  # type: ignore[arg-type]


def test_a_range_in_a_grid_and_optuna_not_installed_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = parse_axes(["method.rank=2..8"])
    with pytest.raises(ConfigError, match="--search optuna"):
        Sweep(Source({}), axes).begin()
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"addenda\[sweep\]"):
        Sweep(Source({}), axes, "optuna").begin()


def test_optuna_gives_new_points_within_the_space_and_the_same_ones_for_the_same_losses() -> None:
    pytest.importorskip("optuna")
    axes = parse_axes(["a.rate=1e-5..1e-2:log", "a.size=2..9", "a.kind=x,[1, 2]"])
    seed = random.randrange(2**31)

    def searched() -> list[dict[str, object]]:
        search = OptunaSearch(axes, trials=13, at_once=4, seed=seed)
        found: list[dict[str, object]] = []
        while points := search.ask():
            assert len(points) == min(4, 13 - len(found))
            found += [dict(point) for point in points]
            search.tell([None if p["a.size"] == 2 else abs(p["a.size"] - 5) + p["a.rate"] for p in points])
        return found

    points = searched()
    assert points == searched()
    assert len({shown(point) for point in points}) == 13
    for point in points:
        assert 1e-5 <= point["a.rate"] <= 1e-2
        assert point["a.size"] in range(2, 10)
        assert point["a.kind"] in ("x", [1, 2])
        assert parse_axes([f"a.rate={toml_value(point['a.rate'])}"])[0].values == (point["a.rate"],)


def test_optuna_ends_when_there_is_nothing_new() -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch(parse_axes(["a.b=1,2,3"]), trials=9, at_once=2, seed=0)
    found = []
    while points := search.ask():
        found += [point["a.b"] for point in points]
        search.tell([float(point["a.b"]) for point in points])
    assert sorted(found) == [1, 2, 3]


def test_samples_of_a_search_hold_every_end() -> None:
    pytest.importorskip("optuna")
    axes = parse_axes([f"s.{letter}=1..2" for letter in "abcdefgh"] + ["s.z=1,2,3"])
    samples = OptunaSearch(axes, trials=3, at_once=1, seed=0).samples()
    for axis in axes:
        assert {1, 2} <= {point[axis.key] for point in samples}
    assert 3 in {point["s.z"] for point in samples}
