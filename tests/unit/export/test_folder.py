"""An exported folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from addenda.errors import BusyError, DiskFullError, ExportError
from addenda.export.folder import new_folder, require_room


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


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFullError), (errno.EROFS, ExportError), (errno.EACCES, ExportError)],
)
def test_what_the_system_refuses_is_an_error_of_ours_and_leaves_nothing(
    number: int, kind: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught, new_folder(tmp_path / "out") as work:
        (work / "half").write_text("x")
        raise OSError(number, os.strerror(number))
    assert "hint:" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass


def test_too_little_room_is_told_beforehand(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(DiskFullError, match="the export needs"):
        require_room(tmp_path, 2**60)
