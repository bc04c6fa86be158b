from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from addenda.bases import load_base
from addenda.bases.hub import _bar_class, load_from_hub
from addenda.core.progress import Progress
from addenda.errors import NotFoundError, UnsafeError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as huggingface_hub lays it out: refs, blobs, and a snapshot of links into the blobs."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    repository = cache / "models--tiny-org--tiny-llama"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(llama_folder.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return cache


def test_a_cached_model_loads_offline_in_place(hub_cache: Path, llama_folder: Path, tmp_path: Path) -> None:
    base = load_base("tiny-org/tiny-llama", offline=True, cache_dir=tmp_path / "own")
    local = load_base(llama_folder)
    assert base.name == "tiny-org/tiny-llama"
    assert base.source == f"tiny-org/tiny-llama@{COMMIT}"
    assert base.folder == hub_cache / "models--tiny-org--tiny-llama" / "snapshots" / COMMIT
    assert not (tmp_path / "own").exists()
    for ours, theirs in zip(base.model.parameters(), local.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_may_be_a_branch_or_a_commit(hub_cache: Path, revision: str) -> None:
    assert load_base(f"tiny-org/tiny-llama@{revision}", offline=True).source.endswith(COMMIT)


def test_the_hubs_own_offline_switch_is_honoured(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: pytest.fail("asked the hub"))
    assert load_from_hub("tiny-org/tiny-llama").kind == "causal-lm"


@pytest.mark.parametrize("name", ["tiny-org/other", "tiny-org/tiny-llama@v2"])
def test_what_is_not_cached_cannot_be_had_offline(hub_cache: Path, name: str) -> None:
    with pytest.raises(NotFoundError, match="not in the hub's cache and the network is off") as caught:
        load_base(name, offline=True)
    assert caught.value.where["cache"] == str(hub_cache)
    assert "network on" in caught.value.hint


def answer(monkeypatch: pytest.MonkeyPatch, what: Exception | list[str]) -> None:
    def model_info(self, repository: str, **options: object) -> SimpleNamespace:
        if isinstance(what, Exception):
            raise what
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in what])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def test_an_unreachable_hub_is_said_in_the_notes_and_in_the_error(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, ConnectionError("no route to host"))
    base = load_from_hub("tiny-org/tiny-llama")
    assert any("out of reach" in note and "no route to host" in note for note in base.notes)
    with pytest.raises(NotFoundError, match="out of reach"):
        load_from_hub("tiny-org/other")


def refusal(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize(
    ("kind", "said", "hint"),
    [
        (errors.RepositoryNotFoundError, "no model", "HF_TOKEN"),
        (errors.GatedRepoError, "gated", "accept its terms"),
        (errors.RevisionNotFoundError, "no revision 'v9'", "branch"),
        (errors.HFValidationError, "not a valid hub id", "org/name"),
    ],
)
def test_the_hubs_refusals_become_typed_errors(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], said: str, hint: str
) -> None:
    answer(monkeypatch, refusal(kind))
    with pytest.raises(NotFoundError, match=said) as caught:
        load_from_hub("tiny-org/tiny-llama", "v9")
    assert hint in caught.value.hint


def test_a_repository_of_pickles_is_refused_before_any_download(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("downloaded"))
    answer(monkeypatch, ["config.json", "pytorch_model.bin", "onnx/model.safetensors"])
    with pytest.raises(UnsafeError, match=r"pytorch_model\.bin"):
        load_from_hub("tiny-org/tiny-llama")
    answer(monkeypatch, ["model.gguf", "README.md"])
    with pytest.raises(NotFoundError, match="no safetensors") as caught:
        load_from_hub("tiny-org/tiny-llama")
    assert ".gguf" in caught.value.hint


def served(folder: Path, asked: list[list[str]]) -> Callable[..., str]:
    def snapshot_download(repository: str, **options: object) -> str:
        asked.append(options["allow_patterns"])
        return str(folder)

    return snapshot_download


def test_settings_are_fetched_and_checked_before_any_weights(
    llama_folder: Path, change_json, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", served(llama_folder, asked))
    answer(monkeypatch, ["config.json", "model.safetensors"])
    assert load_from_hub("tiny-org/tiny-llama").kind == "causal-lm"
    assert [any("safetensors" in pattern for pattern in patterns) for patterns in asked] == [False, True]
    asked.clear()
    change_json(llama_folder / "config.json", auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(UnsafeError, match="auto_map"):
        load_from_hub("tiny-org/tiny-llama")
    assert len(asked) == 1


def test_bytes_are_passed_on_and_nothing_is_drawn(capfd) -> None:
    events: list[Progress] = []
    bar_class = _bar_class("fetch x", events.append)
    with bar_class(total=0, unit="B", unit_scale=True, mininterval=0) as bar:
        bar.total = 100
        bar.update(40)
        bar.update(60)
    with bar_class(total=3, desc="Fetching 3 files") as files:
        files.update(3)
    assert [event.done for event in events][-1] == 100
    assert {event.unit for event in events} == {"bytes"}
    assert capfd.readouterr() == ("", "")
