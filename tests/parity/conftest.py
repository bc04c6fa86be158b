"""What whole-model parity is checked with: the compiled kernels, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from addenda import kernels


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
