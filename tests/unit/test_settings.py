"""The recipe: one schema, three spellings, every value with its origin, all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda.errors import ConfigError, NotFoundError
from addenda.settings import Recipe, resolve, resolve_input


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_later_layers_win_and_each_value_keeps_its_origin(tmp_path: Path) -> None:
    file = written(tmp_path, "[method]\nrank = 4\nalpha = 8.0\n[train]\nepochs = 2\nbatch_size = 4\n")
    recipe = resolve(
        file=file, sets=["train.epochs=5", "method.rank=6"], flags={"method.rank": 8, "base.source": None}
    )
    assert (recipe.method.rank, recipe.train.epochs, recipe.train.batch_size) == (8, 5, 4)
    origins = {
        key: str(recipe.origin(key))
        for key in ("method.rank", "train.epochs", "train.batch_size", "train.eps")
    }
    assert origins == {
        "method.rank": "flag",
        "train.epochs": "--set",
        "train.batch_size": f"file: {file}",
        "train.eps": "default",
    }


def test_resolved_toml_read_back_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = resolve(
        sets=[
            'data.path="a \\"quoted\\" \\u00e9\\t.jsonl"',
            "train.clip_norm=0.5",
            "train.learning_rate=3e-05",
            'method.targets=["q_proj", "v_proj"]',
            "method.ranks={q_proj = 4}",
            "method.rank_stabilized=true",
        ]
    )
    again = resolve(file=written(tmp_path, recipe.to_toml()))
    assert again == recipe
    assert again.data.path == 'a "quoted" é\t.jsonl'


def test_unset_values_are_shown_but_not_given() -> None:
    text = resolve().to_toml()
    assert "# max_steps is unset  (default)" in text
    assert "epochs = 3  # default" in text


def test_a_derived_value_says_why() -> None:
    recipe = resolve()
    assert recipe.train.learning_rate == type(recipe.method).learning_rate
    assert str(recipe.origin("train.learning_rate")) == "derived: suits lora"
    changed = recipe.derive("data.max_tokens", 512, "the base attends to 512 tokens")
    assert changed.data.max_tokens == 512
    assert "max_tokens = 512  # derived: the base attends to 512 tokens" in changed.to_toml()
    assert recipe.data.max_tokens is None


def test_document_gives_each_value_with_its_origin() -> None:
    document = resolve(flags={"data.path": "rows.jsonl"}).document()
    assert document["data.path"] == {"value": "rows.jsonl", "origin": "flag"}
    assert document["method.name"] == {"value": "lora", "origin": "default"}


def test_all_problems_are_reported_at_once_with_nearest_names(tmp_path: Path) -> None:
    file = written(
        tmp_path, 'colour = "red"\n[train]\nepoch = 3\nbatch_size = "many"\n[evals]\nsamples = -1\n'
    )
    with pytest.raises(ConfigError) as caught:
        resolve(file=file, sets=["method.rnk=4", "nonsense"])
    where = caught.value.where
    assert set(where) == {"colour", "train.epoch", "train.batch_size", "method.rnk", "nonsense", "evals"}
    assert "did you mean 'train.epochs'?" in str(where["train.epoch"])
    assert "did you mean 'method.rank'?" in str(where["method.rnk"])
    assert str(where["train.batch_size"]).startswith('must be a whole number, got "many"')
    assert caught.value.message == "6 problems in the recipe"


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("train.epochs=0", "epochs"),
        ("train.epochs=2.5", "must be a whole number, got 2.5 (--set)"),
        ("train.epochs=true", "must be a whole number, got true (--set)"),
        ("method.rank_stabilized=1", "must be true or false, got 1 (--set)"),
        ("data.overflow=wrap", "must be 'drop' or 'cut', got \"wrap\" (--set)"),
        ("method.targets=3", "must be text or a list, got 3 (--set)"),
        ("method.rank=0", "rank"),
        ("data.heldout_fraction=0.9", "heldout_fraction must be in (0, 0.5], got 0.9"),
        ("data.prompt=q", "give both or neither"),
        ("rank=8", "did you mean 'method.rank'?"),
        (f"train.seed={2**63}", "seed must be at most 9223372036854775807"),
    ],
)
def test_one_wrong_value_is_named_with_what_it_must_be(assignment: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(sets=[assignment])
    assert text in caught.value.message


def test_bare_words_in_set_are_text_and_numbers_may_be_whole() -> None:
    recipe = resolve(sets=["base.source=my-model", "train.learning_rate=1"])
    assert recipe.base.source == "my-model"
    assert recipe.train.learning_rate == 1.0


def test_the_method_decides_which_keys_exist() -> None:
    assert resolve(sets=["method.name=bitfit"]).method.name == "bitfit"
    with pytest.raises(ConfigError, match=r"method\.rank"):
        resolve(sets=["method.name=bitfit", "method.rank=4"])
    with pytest.raises(NotFoundError, match="did you mean 'lora'"):
        resolve(sets=["method.name=lroa"])


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere\.toml"):
        resolve(file=tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="is not TOML"):
        resolve(file=written(tmp_path, "epochs = three\n"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(ConfigError, match="not UTF-8 at byte 11"):
        resolve(file=tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="cannot be read: is a directory") as caught:
        resolve(file=tmp_path)
    assert "TOML" in caught.value.hint


def test_an_unknown_section_is_answered_with_the_sections_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(sets=["zzz.xyz=1"])
    assert "name out base data train evals method" in caught.value.message
    assert len(caught.value.message) < 200


def test_recipes_with_the_same_values_are_equal_whatever_their_origins() -> None:
    assert isinstance(resolve(), Recipe)
    assert resolve(sets=["train.epochs=3"]) == resolve()


@pytest.mark.parametrize(
    "sets", [[], ["data.max_tokens=64", "base.source=x"], ["method.rank=4", "data.shape=text"]]
)
def test_base_and_data_alone_are_those_of_the_whole_recipe(sets: list[str]) -> None:
    recipe = resolve(sets=sets)
    assert resolve_input(sets=sets) == (recipe.base, recipe.data)


@pytest.mark.parametrize(
    "sets", [["method.rank=0"], ["data.max_tokens=no"], ["metod.rank=3"], ["nothing"], ["evals.samples=-1"]]
)
def test_base_and_data_alone_are_refused_as_the_whole_recipe_is(sets: list[str]) -> None:
    with pytest.raises(ConfigError) as whole:
        resolve(sets=sets)
    with pytest.raises(ConfigError) as part:
        resolve_input(sets=sets)
    assert str(part.value) == str(whole.value)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_a_device_is_named_as_pytorch_names_it(device: str) -> None:
    assert resolve(sets=[f"base.device={device}"]).base.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:1\n", ""])
def test_another_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda or cuda:N"):
        resolve(flags={"base.device": device})
