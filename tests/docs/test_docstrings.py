"""Every example in a docstring of the package prints what it shows; a warning is an error here too."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import addenda

SOURCE = Path(__file__).resolve().parents[2] / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


# What needs a pretrained model, or a class to be written, is no matter of a docstring.
TOO_LARGE = {"LoadedBase", "Method", "load_base", "run"}


def test_what_the_package_offers_has_an_example() -> None:
    offers = {name: getattr(addenda, name) for name in addenda.__all__ if name not in TOO_LARGE}
    code = {
        name: value
        for name, value in offers.items()
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception))
    }
    assert "attach" in code
    assert [name for name, value in code.items() if ">>>" not in (value.__doc__ or "")] == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert not report, "".join(report)
    assert runner.tries > 0, f"{name} holds '>>>' in no docstring that is found"
