"""The reference pages are complete, and a stale one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from addenda.cli.app import VERBS
from addenda.core import registry
from addenda.data.checks import CHECKS
from addenda.export.peft.form import forms
from addenda.settings import resolve

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def docs(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("docs")


@dataclass(frozen=True)
class Sample:
    """A settings class."""

    needed: int
    """What it
    means."""
    rates: tuple[float, ...] = (0.5, 1.0)
    on: bool = True
    name: str | None = None
    """A name."""
    extra: dict[str, int] = field(default_factory=dict)


def test_fields_are_read_with_the_string_under_them(docs: ModuleType) -> None:
    assert docs.settings_of(Sample) == [
        ("needed", "int", "required", "What it means."),
        ("rates", "tuple[float, ...]", "`[0.5, 1.0]`", ""),
        ("on", "bool", "`true`", ""),
        ("name", "str | None", "unset", "A name."),
        ("extra", "dict[str, int]", "`{}`", ""),
    ]


def test_bars_in_cells_do_not_split_them(docs: ModuleType) -> None:
    assert docs.table(["type"], [["`a | b`"]]).splitlines()[-1] == "| `a \\| b` |"


def test_labels_become_items(docs: ModuleType) -> None:
    text = "What it finds: a row\nwithout a role.\nWhy it matters: it\nfails."
    assert (
        docs.paragraphs(text) == "- **What it finds**: a row without a role.\n- **Why it matters**: it fails."
    )


def test_a_missing_a_changed_and_a_foreign_page_are_stale(
    docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        docs, "PAGES", {"good.md": lambda: "a", "changed.md": lambda: "b", "gone.md": lambda: "c"}
    )
    (tmp_path / "good.md").write_text("a")
    (tmp_path / "changed.md").write_text("older")
    (tmp_path / "foreign.md").write_text("by hand")
    assert docs.stale(tmp_path) == ["changed.md", "gone.md", "foreign.md"]


def test_the_list_in_the_readme_is_replaced_and_nothing_else(docs: ModuleType) -> None:
    marks = "<!-- methods: written by `make docs` -->", "<!-- end of methods -->"
    text = docs.readme(f"before {marks[0]} anything {marks[1]} after")
    assert text.startswith(f"before {marks[0]}\n\n[")
    assert "`lora`" in text
    assert text.endswith(f".\n\n{marks[1]} after")
    assert docs.readme(text) == text
    with pytest.raises(SystemExit, match="lacks the marks"):
        docs.readme("a page without them")


def test_every_verb_method_check_and_key_is_documented() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    missing = [verb for verb in VERBS if f"## addenda {verb}\n" not in pages["cli.md"]]
    missing += [name for name in registry.names() if f"## {name}\n" not in pages["methods.md"]]
    missing += [code for code in CHECKS if f"## {code}\n" not in pages["findings.md"]]
    missing += [name for name in registry.names() if f"\n{name} " not in pages["methods.md"]]
    missing += [name for name in forms() if f"[`{name}`](methods.md#{name})" not in pages["peft.md"]]
    keys = [key.rpartition(".")[2] for key in resolve().values() if not key.startswith("method.")]
    missing += [key for key in keys if f"`{key}`" not in pages["recipe.md"]]
    assert not missing


def test_the_maps_name_every_room() -> None:
    root = REFERENCE.parents[1]
    rooms = [path.parent.name for path in (root / "src" / "addenda").glob("*/__init__.py")]
    architecture, readme = (
        (root / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "README.md")
    )
    assert rooms
    assert [room for room in rooms if f"**{room}**" not in architecture] == []
    assert [room for room in rooms if f"  {room}/" not in readme] == []


def test_every_setting_says_what_it_means(docs: ModuleType) -> None:
    recipe = resolve()
    classes = [type(part) for part in (recipe.base, recipe.data, recipe.train, recipe.evals)]
    classes += [registry.get(name) for name in registry.names()]
    silent = [f"{cls.__name__}.{s.name}" for cls in classes for s in docs.settings_of(cls) if not s.text]
    top = [key for key in recipe.values() if "." not in key]
    silent += [s.name for s in docs.settings_of(type(recipe)) if s.name in top and not s.text]
    assert not silent
