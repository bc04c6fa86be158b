"""What several tests of exports share."""

from __future__ import annotations

import pytest


@pytest.fixture
def shared_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is made of a base, and takes a while, for all tests of this run."""
    monkeypatch.setenv("ADDENDA_HOME", str(tmp_path_factory.getbasetemp() / "home"))
