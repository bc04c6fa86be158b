from __future__ import annotations

import errno
import json
import os
import random
import shutil

import pytest
import torch

from addenda.errors import CheckpointError, DiskFullError
from addenda.train import checkpoint as module
from addenda.train import failpoints
from addenda.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside,
    sweep,
    verify_checkpoint,
)


def made(step, *, best=True, size=40):
    return Checkpoint(
        step=step,
        adapter={"a.A": torch.randn(size, 3), "a.B": torch.randn(2)},
        optimizer={"a.A.step": torch.tensor(float(step)), "a.A.exp_avg": torch.randn(size, 3)},
        best={"a.A": torch.randn(size, 3), "a.B": torch.randn(2)} if best else None,
        state={"run": {"step": step, "loss": [0.1, 1 / 3]}, "identity": {"data": "0a1b"}},
    )


@pytest.fixture
def parent(tmp_path):
    return tmp_path / "run" / "checkpoints"


def names(parent):
    return sorted(folder.name for folder in parent.iterdir())


def assert_same(one, other):
    assert (one.step, one.state) == (other.step, other.state)
    assert (one.best is None) == (other.best is None)
    for name, tensors in one.tensor_files().items():
        read = other.tensor_files()[name]
        assert sorted(tensors) == sorted(read)
        assert all(torch.equal(tensors[key], read[key]) for key in tensors)


@pytest.mark.parametrize("best", [True, False])
def test_what_is_saved_is_read_back_bit_for_bit(parent, best):
    before = made(7, best=best)
    folder, size = save_checkpoint(before, parent, keep=2)
    assert folder == parent / "step-000007"
    assert size == sum(file.stat().st_size for file in folder.iterdir())
    assert_same(before, load_checkpoint(folder))
    assert find_checkpoint(parent).folder == folder


def test_an_empty_optimizer_is_saved_before_the_first_step(parent):
    before = Checkpoint(0, {"a": torch.ones(1)}, {}, None, {})
    assert load_checkpoint(save_checkpoint(before, parent, keep=2)[0]).optimizer == {}


def test_the_newest_are_kept_by_step_whatever_their_clocks_say(parent):
    for step in (9, 10, 100):
        folder, _ = save_checkpoint(made(step), parent, keep=2)
        os.utime(folder, (2e9 - step * 1e6, 2e9 - step * 1e6))
    assert names(parent) == ["step-000010", "step-000100"]
    assert find_checkpoint(parent).folder == parent / "step-000100"


def damaged_file(folder):
    return random.choice(sorted(file for file in folder.iterdir()))


@pytest.mark.parametrize("trial", range(20))
def test_a_truncated_checkpoint_is_skipped_with_its_reason(parent, trial):
    older, _ = save_checkpoint(made(1), parent, keep=2)
    newest, _ = save_checkpoint(made(2), parent, keep=2)
    file = damaged_file(newest)
    os.truncate(file, random.randrange(file.stat().st_size))
    found = find_checkpoint(parent)
    assert found.folder == older
    assert file.name in found.skipped[newest]
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(newest)


def test_every_flipped_bit_is_detected(parent):
    newest, _ = save_checkpoint(made(2), parent, keep=2)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for _ in range(60):
            place, bit = random.randrange(len(whole)), random.randrange(8)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert verify_checkpoint(newest), f"{file.name}, byte {place}, bit {bit}"
        file.write_bytes(whole)
    assert verify_checkpoint(newest) == ""


@pytest.mark.parametrize(
    "name",
    ["adapter.safetensors", "optimizer.safetensors", "best.safetensors", "state.json", "MANIFEST.json"],
)
def test_a_missing_file_is_named(parent, name):
    folder, _ = save_checkpoint(made(3), parent, keep=2)
    (folder / name).unlink()
    assert find_checkpoint(parent).skipped == {folder: f"{name} is missing"}


def test_a_renamed_checkpoint_is_not_taken_for_another_step(parent):
    folder, _ = save_checkpoint(made(3), parent, keep=2)
    folder.rename(parent / "step-000009")
    assert verify_checkpoint(parent / "step-000009") == "MANIFEST.json is of step 3"


def test_a_manifest_of_another_version_is_refused(parent, monkeypatch):
    folder, _ = save_checkpoint(made(3), parent, keep=2)
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    assert "version 1" in verify_checkpoint(folder)


def test_a_manifest_cannot_reach_outside_its_folder(parent):
    folder, _ = save_checkpoint(made(3), parent, keep=2)
    manifest = folder / "MANIFEST.json"
    text = manifest.read_text().replace('"best.safetensors"', '"../best.safetensors"')
    manifest.write_bytes(module._json(json.loads(text)))
    assert "outside" in verify_checkpoint(folder)


def test_a_checkpoint_of_the_same_step_is_left_alone_if_whole_and_replaced_if_damaged(parent):
    first = made(5)
    folder, _ = save_checkpoint(first, parent, keep=2)
    save_checkpoint(made(5), parent, keep=2)
    assert_same(load_checkpoint(folder), first)
    (folder / "state.json").unlink()
    second = made(5)
    save_checkpoint(second, parent, keep=2)
    assert_same(load_checkpoint(folder), second)
    assert names(parent) == ["step-000005"]


def writes_of_one_save(parent, monkeypatch):
    passed = []
    monkeypatch.setattr(module, "failpoint", passed.append)
    save_checkpoint(made(1), parent, keep=2)
    monkeypatch.setattr(module, "failpoint", failpoints.failpoint)
    return passed


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_disk_that_fails_at_any_place_leaves_the_one_before_whole(parent, monkeypatch, action):
    passed = writes_of_one_save(parent, monkeypatch)
    older, _ = save_checkpoint(made(1), parent, keep=2)
    for count, name in enumerate(passed):
        if name in ("checkpoint.after_rename", "checkpoint.rotate", "checkpoint.rotated"):
            continue
        monkeypatch.setattr(failpoints, "_passed", {})
        nth = passed[: count + 1].count(name)
        monkeypatch.setenv("ADDENDA_FAILPOINTS", f"{name}={action}@{nth}")
        with pytest.raises(DiskFullError if action == "enospc" else CheckpointError) as caught:
            save_checkpoint(made(2), parent, keep=2)
        assert caught.value.exit_code == (6 if action == "enospc" else 1)
        assert names(parent) == ["step-000001"]
        assert verify_checkpoint(older) == ""
    monkeypatch.delenv("ADDENDA_FAILPOINTS")
    save_checkpoint(made(2), parent, keep=2)
    assert names(parent) == ["step-000001", "step-000002"]


def test_a_limit_on_the_size_of_files_is_no_room_either(parent, monkeypatch):
    def too_large(path, data):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))

    older, _ = save_checkpoint(made(1), parent, keep=2)
    monkeypatch.setattr(module, "_write", too_large)
    with pytest.raises(DiskFullError, match="larger than a file may be"):
        save_checkpoint(made(2), parent, keep=2)
    assert names(parent) == ["step-000001"]
    assert verify_checkpoint(older) == ""


def test_too_little_room_is_found_before_anything_is_written(parent, monkeypatch):
    save_checkpoint(made(1), parent, keep=2)
    usage = shutil.disk_usage(parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(module, "_write_files", lambda *a: pytest.fail("something was written"))
    with pytest.raises(DiskFullError) as caught:
        save_checkpoint(made(2), parent, keep=2)
    assert caught.value.where["free"] == "1,000 bytes"
    assert int(caught.value.where["need"].split()[0].replace(",", "")) > 1000
    assert names(parent) == ["step-000001"]


def test_sweeping_removes_what_was_half_written_and_nothing_else(parent):
    save_checkpoint(made(1), parent, keep=2)
    half = parent / ".tmp-0123"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    assert find_checkpoint(parent).folder == parent / "step-000001"
    sweep(parent)
    assert names(parent) == ["step-000001"]


def test_a_checkpoint_set_aside_is_no_longer_found(parent):
    folder, _ = save_checkpoint(made(1), parent, keep=2)
    aside = set_aside(folder)
    assert aside.exists()
    assert find_checkpoint(parent).folder is None
    assert find_checkpoint(parent / "nowhere").folder is None


def test_values_that_json_cannot_hold_are_refused(parent):
    state = {"loss": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(Checkpoint(1, {}, {}, None, state), parent, keep=2)
    assert names(parent) == []
