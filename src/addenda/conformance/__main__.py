"""Run the conformance suite and show which method stands where: ``python -m addenda.conformance [METHOD ...]``."""

from __future__ import annotations

import sys

import pytest


def main(names: list[str]) -> int:
    """Try the methods of these names, all where none is given; return pytest's exit code."""
    here = ["--pyargs", "addenda.conformance", "-p", "addenda.conformance.matrix", "-p", "no:cacheprovider"]
    return int(pytest.main([*here, "--quiet", *(f"--method={name}" for name in names)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
