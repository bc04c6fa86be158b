"""The size rules hold, and the tool that holds them can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def size(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("size")


def test_the_package_keeps_its_sizes(size: ModuleType) -> None:
    assert size.problems(ROOT / "src" / "addenda") == []


def test_a_long_function_is_found_and_its_docstring_does_not_count(size: ModuleType, tmp_path: Path) -> None:
    body, doc = "    x = 1\n" * 59, '    """Say.\n' + "    more\n" * 40 + '    """\n'
    room = tmp_path / "core"
    room.mkdir()
    (room / "good.py").write_text("def f():\n" + doc + body)
    assert size.problems(tmp_path) == []
    (room / "bad.py").write_text("def g():\n" + doc + body + "    y = 2\n")
    assert size.problems(tmp_path) == ["core/bad.py:1: g has 61 lines, limit 60"]


def test_only_one_long_function_is_excused_in_the_loop(size: ModuleType, tmp_path: Path) -> None:
    room = tmp_path / "train"
    room.mkdir()
    long = "def f{}():\n" + "    x = 1\n" * 99
    (room / "loop.py").write_text(long.format(1))
    assert size.problems(tmp_path) == []
    (room / "loop.py").write_text(long.format(1) + long.format(2))
    assert [text.split(": ")[1] for text in size.problems(tmp_path)] == ["f2 has 100 lines, limit 60"]


def test_a_long_file_an_overdrawn_room_and_an_unknown_room_are_found(
    size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size, "BUDGETS", {"core": 600})
    for room in ("core", "attic"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "long.py").write_text("x = 1\n" * 601)
    assert size.problems(tmp_path) == [
        "attic/long.py: 601 lines, limit 500",
        "core/long.py: 601 lines, limit 500",
        "attic: the room has no budget in tools/size.py",
        "core: 601 lines, budget 600",
    ]
