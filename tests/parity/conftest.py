"""What parity is checked with: the compiled kernels and plain PyTorch, and a record of the differences from PEFT."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import Tensor

import addenda
from addenda import kernels


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
        packages = {name: version(name) for name in ("peft", "torch", "transformers")}
        largest = {
            name: {
                way: {"cases": len(all_of), "largest": max(all_of, default=None)}
                for way, all_of in ways.items()
            }
            for name, ways in sorted(found.items())
        }
        text = json.dumps({"packages": packages, "differences": largest}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


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
