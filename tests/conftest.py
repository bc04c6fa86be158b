"""What every test gets: a fixed seed, no network, no accidental download, and the GPU mark."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> int:
    """Seed Python's, NumPy's and PyTorch's generators from the test's own name; returns the seed.

    Each test draws other numbers than its neighbours, and the same ones every time. ADDENDA_TEST_SEED=n draws
    others: a property must hold for any of them.
    """
    seed = zlib.crc32(f"{os.environ.get('ADDENDA_TEST_SEED', '')}/{request.node.nodeid}".encode())
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
    return seed


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that opens a connection to another machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in LOCAL_HOSTS:
            raise AssertionError(f"the test reached for the network: {address}")
        return connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled() -> None:
    """Compile the kernels before any test asks for them: whether they run must not depend on the order of the tests."""
    from addenda.errors import KernelError
    from addenda.kernels.build import build

    with contextlib.suppress(KernelError):
        build()


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    """Load a script of ``tools/`` as a module, by its name."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).resolve().parent.parent / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"tools_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    return load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where none answers."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not gpu_answers():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU answers on this machine"))


def gpu_answers() -> bool:
    """Tell whether the NVIDIA driver lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout
