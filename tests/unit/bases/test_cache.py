from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from addenda.bases import cache
from addenda.core.progress import Progress
from addenda.errors import BaseModelError, DiskFullError


def finished(root: Path) -> Path:
    folder = root / "models" / "tiny-v1"
    with cache.staged(folder, label="tiny") as work:
        (work / "config.json").write_text("{}")
        (work / "model.safetensors").write_bytes(os.urandom(4096))
        cache.write_manifest(work, {"source": "tiny==1"})
    return folder


def test_the_most_specific_cache_folder_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADDENDA_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root().name == "addenda"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "addenda"
    monkeypatch.setenv("ADDENDA_HOME", str(tmp_path / "home"))
    assert cache.cache_root() == tmp_path / "home"
    assert cache.cache_root(tmp_path / "here") == tmp_path / "here"


def test_a_staged_folder_appears_whole_with_a_manifest_that_holds(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    record = cache.check_manifest(folder, verify=True)
    assert record["source"] == "tiny==1"
    assert set(record["files"]) == {"config.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-v1"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_neither_the_folder_nor_its_unfinished_work(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), cache.staged(tmp_path / "models" / "x", label="x") as work:
        (work / "half").write_text("half")
        raise error
    assert list((tmp_path / "models").iterdir()) == []


def test_a_full_disk_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="disk filled up"), cache.staged(tmp_path / "x", label="x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskFullError, match="free"):
        cache.require_space(tmp_path, 2**60)


def test_sweep_removes_only_what_its_own_label_left(tmp_path: Path) -> None:
    mine, other = cache.partial_path(tmp_path, "a"), cache.partial_path(tmp_path, "a-b")
    for path in (mine, other):
        path.mkdir()
        (path / "half").write_text("half")
    cache.sweep(tmp_path, "a")
    assert not mine.exists()
    assert other.exists()


def damage_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(4095)


def damage_bit(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[1000] ^= 4
    (folder / "model.safetensors").write_bytes(raw)


def damage_extra(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def damage_version(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, "format_version": 99}))


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_cut, damage_bit, damage_extra, damage_manifest, damage_version]
)
def test_damage_is_found_at_load_and_the_message_names_the_folder(tmp_path: Path, damage) -> None:
    folder = finished(tmp_path)
    damage(folder)
    with pytest.raises(BaseModelError, match="damaged") as caught:
        cache.check_manifest(folder)
    assert str(folder) in caught.value.hint


def test_a_flipped_bit_in_a_large_file_is_found_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tmp_path)
    damage_bit(folder)
    monkeypatch.setattr(cache, "HASHED_AT_LOAD", 100)
    assert cache.check_manifest(folder)["files"]
    with pytest.raises(BaseModelError, match="other contents"):
        cache.check_manifest(folder, verify=True)


def test_a_second_holder_waits_and_says_so(tmp_path: Path) -> None:
    events: list[Progress] = []
    entered = threading.Event()

    def second() -> None:
        with cache.locked(tmp_path, "tiny", events.append):
            entered.set()

    with cache.locked(tmp_path, "tiny"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(1.3)
        assert "wait for another process" in events[0].task
    thread.join(10)
    assert entered.is_set()
