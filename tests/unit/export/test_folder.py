"""An exported folder is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda.errors import BusyError
from addenda.export.folder import new_folder


def test_a_finished_folder_appears_under_its_name(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as work:
        (work / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "a"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as work:
        (work / "a.txt").write_text("a")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as work:
        (work / "a.txt").write_text("a")
    with pytest.raises(BusyError, match="is not empty"), new_folder(tmp_path / "empty"):
        pytest.fail("the block ran")
    assert (tmp_path / "empty" / "a.txt").read_text() == "a"
