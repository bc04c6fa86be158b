"""The package declares what it imports, and imports what it declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(requirement: str) -> str:
    """The normalized distribution name of a requirement line."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~\[;(]", requirement, maxsplit=1)[0]).lower()


def imported() -> set[str]:
    """Distributions that the package imports, lazily or at once; types-only imports count too."""
    modules: set[str] = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.partition(".")[0])
    foreign = modules - set(sys.stdlib_module_names) - {"addenda"}
    distributions = packages_distributions()
    return {canonical(distributions.get(module, [module])[0]) for module in foreign}


def declared() -> set[str]:
    return {canonical(line) for line in PROJECT["dependencies"]}


def optional() -> set[str]:
    return {canonical(line) for lines in PROJECT["optional-dependencies"].values() for line in lines}


def test_every_import_is_declared() -> None:
    assert imported() <= declared() | optional()


def test_every_dependency_is_imported() -> None:
    assert declared() <= imported()


def test_every_declared_package_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert declared() | optional() - {"addenda"} <= {canonical(pin) for pin in pins}


def test_torch_is_pinned_without_a_build() -> None:
    assert "\ntorch==2.13.0\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
