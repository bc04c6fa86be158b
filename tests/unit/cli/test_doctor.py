"""The doctor names what will not work, and its exit code says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from addenda.cli import doctor
from addenda.cli.app import run

GIB = 2**30


def checks(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, dict[str, str]]:
    assert run(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (code == 0)
    return {check["name"]: check for check in found["checks"]}


def test_a_sound_machine_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADDENDA_HOME", str(tmp_path / "not" / "yet"))
    found = checks(capsys, 0)
    assert {
        "python",
        "torch",
        "transformers",
        "processor",
        "threads",
        "memory",
        "cache",
        "disk",
        "models",
    } <= set(found)
    assert str(tmp_path) in found["cache"]["found"]
    assert not list(tmp_path.iterdir())
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok", "warn", "fail", " ")) for line in lines)


def test_everything_that_is_not_ok_has_a_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB // 4, total=4 * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB))
    monkeypatch.setattr(doctor, "_EXTRAS", {"peft": ("no-such-package", "nothing")})
    (tmp_path / "file").write_text("")
    found = checks(capsys, 1)
    assert found["memory"]["status"] == "fail"
    assert (found["disk"]["status"], found["peft"]["status"]) == ("warn", "warn")
    assert all(check["fix"] for check in found.values() if check["status"] != "ok")


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = doctor._writable("cache", tmp_path, "the cache", "choose another")
    assert (check.status, check.found, check.fix) == (
        "fail",
        "the cache: Permission denied",
        "choose another",
    )
