"""Where a run is put, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda.errors import BaseModelError, BusyError, ConfigError, DataError, NotFoundError
from addenda.recipe import Note, encoder_for, prepare_base, prepare_data, run, with_folder
from addenda.settings import BaseSettings, DataSettings, Recipe, resolve


def recipe(data: Path, out: Path | None = None, **flags: object) -> Recipe:
    return resolve(flags={"data.path": str(data), "out": None if out is None else str(out), **flags})


def never(event: object) -> None:
    raise AssertionError(f"nothing was to happen: {event}")


def test_the_folder_is_named_for_data_and_method_and_the_first_free_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = recipe(Path("data/rows.jsonl"), **{"method.name": "ia3"})
    assert with_folder(wanted).out == str(Path("runs/rows-ia3"))
    (tmp_path / "runs" / "rows-ia3").mkdir(parents=True)
    chosen = with_folder(wanted)
    assert chosen.out == str(Path("runs/rows-ia3-2"))
    assert chosen.origin("out").kind == "derived"
    (tmp_path / "runs" / "rows-ia3" / ".lock").touch()  # left by a run that could not start
    assert with_folder(wanted).out == str(Path("runs/rows-ia3"))
    assert with_folder(recipe(Path("x"), Path("mine"))).out == "mine"


@pytest.mark.parametrize(
    ("content", "options", "error"),
    [
        ({"notes.txt": "mine"}, {}, BusyError),
        ({"notes.txt": "mine"}, {"force": True}, BusyError),
        ({"notes.txt": "mine"}, {"resume": True}, NotFoundError),
        ({"recipe.resolved.toml": ""}, {}, BusyError),
        ({}, {"resume": True}, NotFoundError),
    ],
)
def test_a_place_that_does_not_fit_is_refused_untouched(
    content: dict[str, str], options: dict[str, bool], error: type[Exception], tmp_path: Path
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error):
        run(recipe(tmp_path / "none.jsonl", tmp_path), on_event=never, **options)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BusyError, match="is a file"):
        run(recipe(tmp_path / "none.jsonl", tmp_path / "out"), on_event=never)


def test_data_is_named_checked_and_described(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data was named"):
        prepare_data(DataSettings(), never)
    rows = tmp_path / "rows.csv"
    rows.write_text("question,reply\n" + "".join(f"ask {n},answer {n}\n" for n in range(12)))
    told: list[object] = []
    dataset = prepare_data(DataSettings(path=str(rows), prompt="question", completion="reply"), told.append)
    assert dataset.conversations[3].messages[1].content == "answer 3"
    assert any(isinstance(event, Note) and "csv" in event.text for event in told)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError):
        prepare_data(DataSettings(path=str(tmp_path / "bad.jsonl")), told.append)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small encoder and nothing else: what cannot be trained to answer."""
    import transformers
    from tokenizers import Tokenizer, models

    folder = tmp_path / "encoder"
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_an_encoder_is_refused(tiny: Path) -> None:
    with pytest.raises(BaseModelError, match="is an encoder"):
        prepare_base(BaseSettings(str(tiny)), None, lambda event: None)


def test_rows_longer_than_the_base_can_read_are_refused_up_front() -> None:
    from types import SimpleNamespace

    base = SimpleNamespace(room=128, tokenizer=None, chat_template=None)
    with pytest.raises(ConfigError, match=r"more than the base's context of 128 tokens") as caught:
        encoder_for(base, DataSettings(path="x", max_tokens=129))  # type: ignore[arg-type]
    assert "data.max_tokens=128" in caught.value.hint
