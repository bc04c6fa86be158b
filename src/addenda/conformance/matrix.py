"""Which method stands where, as a table: of what is declared, and of what pytest found."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from addenda.conformance.cases import Case, changes_sequence, on_layers, on_models
from addenda.conformance.layers import LAYERS
from addenda.conformance.models import MODELS
from addenda.core import registry

__all__ = ["cases_of", "matrix", "refusals"]

Place = tuple[str, str]
"""A method's name, and that of a layer or model."""
LEGEND = """\
+  every property holds        *  but for the exceptions that the method declares, with the reason
/  with some of its settings   -  refused by the plan, with the reason"""


def cases_of(name: str) -> tuple[Case, ...]:
    """Return all cases of a method: on models if it changes the sequence, on layers if not."""
    return on_models(name) if changes_sequence(registry.get(name)) else on_layers(name)


def matrix(
    names: Iterable[str], failed: Collection[Place] = (), passed: Collection[Place] | None = None
) -> str:
    """Return the table of these methods, one mark for each method and place.

    Args:
        names: of the methods; each takes a line.
        failed: where a property did not hold.
        passed: where all that was tried did; None takes what is declared for granted.
    """
    labels = dict(zip([*LAYERS, *MODELS], string.ascii_letters, strict=False))
    width = max(len(name) for name in registry.names())
    lines = [" " * width + " " + " ".join(labels.values())]
    for name in names:
        declared = _declared(name)
        marks = []
        for place in labels:
            mark = declared.get(place, " ")
            if (name, place) in failed:
                mark = "F"
            elif mark not in " -" and passed is not None and (name, place) not in passed:
                mark = "."
            marks.append(mark)
        lines.append(f"{name:<{width}} {' '.join(marks)}".rstrip())
    legend = LEGEND + ("" if passed is None else "\nF  a property fails            .  not tried")
    places = [f"{label}  {place}" for place, label in labels.items()]
    return "\n".join([*lines, "", legend, "", *_columns(places)])


def _declared(name: str) -> dict[str, str]:
    """Return the mark of each place on which a method is tried."""
    refused = defaultdict(list)
    for case in cases_of(name):
        refused[case.place].append(case.refusal is not None)
    stands = "*" if registry.get(name).exceptions else "+"
    return {p: "-" if all(found) else "/" if any(found) else stands for p, found in refused.items()}


def _columns(entries: list[str], count: int = 4) -> list[str]:
    rows = [entries[start : start + count] for start in range(0, len(entries), count)]
    return ["".join(f"{entry:<30}" for entry in row).rstrip() for row in rows]


def refusals(name: str) -> Mapping[str, list[str]]:
    """Return the places on which all settings of a method are refused, by the reason."""
    declared = _declared(name)
    found: dict[str, list[str]] = defaultdict(list)
    for case in cases_of(name):
        if declared[case.place] == "-" and case.refusal and case.place not in found[case.refusal]:
            found[case.refusal].append(case.place)
    return found


# ------------------------------------------------------------------------------------------------ as a plugin of pytest


def pytest_addoption(parser: Any) -> None:
    """Let a run name the methods that it tries."""
    parser.addoption("--method", action="append", help="try this method alone; may be given several times")


def pytest_configure(config: Any) -> None:
    """Watch the run."""
    config.pluginmanager.register(Watch(config.getoption("method")), "addenda-matrix")


class Watch:
    """Sees where the properties hold, and shows it at the end.

    Args:
        names: of the methods that are tried; all where none is named.
    """

    def __init__(self, names: Iterable[str] | None) -> None:
        self.names = list(names or registry.names())
        self.places: dict[str, Place] = {}
        self.passed: set[Place] = set()
        self.failed: set[Place] = set()

    def pytest_itemcollected(self, item: Any) -> None:
        """Note which method and place a test is about."""
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        if "method" in chosen:
            place = chosen.get("layer") or chosen.get("kind") or "linear"
            self.places[item.nodeid] = (chosen["method"].name, place)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how a test went."""
        place = self.places.get(report.nodeid)
        if place is not None and report.failed:
            self.failed.add(place)
        elif place is not None and report.passed and report.when == "call":
            self.passed.add(place)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table."""
        terminalreporter.section("where the methods stand")
        terminalreporter.write_line(matrix(self.names, self.failed, self.passed))
