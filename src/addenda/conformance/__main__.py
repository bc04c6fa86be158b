"""Run the conformance suite and show which method stands where: ``python -m addenda.conformance [METHOD ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from addenda.core import registry
from addenda.errors import AddendaError, MissingDependencyError

__all__ = ["main"]


def main(names: Sequence[str]) -> int:
    """Try the methods of these names, all where none is given; return pytest's exit code.

    Raises:
        NotFoundError: no method has one of the names.
        MissingDependencyError: pytest is not installed.
    """
    for name in names:
        registry.get(name)
    try:
        import pytest
    except ImportError as missing:
        raise MissingDependencyError(
            "the conformance suite runs under pytest, which is not installed",
            hint="pip install 'addenda[conformance]'",
        ) from missing
    here = ["--pyargs", "addenda.conformance", "-p", "addenda.conformance.matrix", "-p", "no:cacheprovider"]
    return int(pytest.main([*here, "--quiet", *(f"--method={name}" for name in names)]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except AddendaError as problem:
        sys.exit(str(problem))
