"""Every numbered example runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9][0-9]_*.py"))
NEED_A_RUN = {"03_score_the_support_bot"}
"""Those that read what `make demo` leaves; tests/e2e/test_demo.py runs them."""


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem) for path in EXAMPLES if path.stem not in NEED_A_RUN]
)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "False" not in done.stdout
    assert done.stdout.strip()
