"""What parity is checked with: the compiled kernels and plain PyTorch, and a record of the differences from PEFT."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import Tensor

import addenda
from addenda import kernels
from addenda.export.peft.form import forms
from addenda.export.peft.reading import known_keys


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", help="write the largest differences from PEFT to this JSON file")


@pytest.fixture(scope="session")
def differing(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[addenda.Handle, str, Tensor, Tensor], float]]:
    """Return the largest difference of two answers, relative to the largest value, and note it for the table.

    The direction is "written" for an adapter of ours that PEFT runs, "read" for one of PEFT's that runs here.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"written": [], "read": []})

    def note(handle: addenda.Handle, direction: str, theirs: Tensor, ours: Tensor) -> float:
        difference = float((theirs - ours).detach().abs().max() / ours.detach().abs().max())
        found[handle.method.name][direction].append(difference)
        return difference

    yield note
    if path := request.config.getoption("parity_table", None):
        text = json.dumps({**of_peft(), "differences": largest(found)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


def largest(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, object]]]:
    """Return how many cases each method was tried in, each way, and the largest difference in three digits."""
    return {
        name: {
            way: {"cases": len(each), "largest": float(f"{max(each):.2e}") if each else None}
            for way, each in ways.items()
        }
        for name, ways in sorted(found.items())
    }


@pytest.fixture(name="of_peft")
def _of_peft() -> Callable[[], dict[str, object]]:
    return of_peft


def of_peft() -> dict[str, object]:
    """Return PEFT's types, and the settings of each that no form of ours reads, so that they are refused where set."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    unread = {}
    for kind in sorted(peft.PeftType, key=str):
        known = [known_keys(form) for form in forms().values() if form.peft_type == kind.value]
        keys = {field.name for field in dataclasses.fields(CONFIGS[kind])}
        unread[kind.value] = sorted(keys - set().union(*known)) if known else None
    packages = {name: version(name) for name in ("peft", "torch", "transformers")}
    return {"packages": packages, "refused": unread}


@pytest.fixture(params=["kernels", "plain"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the kernels, and again without."""
    if request.param == "kernels":
        if not kernels.enable():
            pytest.skip(f"no kernels on this machine: {kernels.state()}")
        yield request.param
        return
    with kernels.kernels_off():
        yield request.param
