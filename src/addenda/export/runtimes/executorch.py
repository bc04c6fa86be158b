"""ExecuTorch's own runtime, with XNNPACK, on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from addenda.errors import ExportError
from addenda.export.executorch.lowering import require_executorch
from addenda.export.packages import require
from addenda.export.probes import Kind, Row, scored
from addenda.export.runtime import Runtime

__all__ = ["ExecuTorchRuntime"]


class ExecuTorchRuntime(Runtime):
    """One program, loaded.

    Args:
        path: the file.
        names: what its inputs are called in a row, in their order.

    Raises:
        ExportError: the file is damaged, or not one that ExecuTorch reads.
        MissingDependencyError: ExecuTorch is not installed.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        library = require_executorch("runtime")
        self.name = (
            f"ExecuTorch {require('executorch', 'ExecuTorch programs', 'executorch.version').__version__}"
        )
        self._names = tuple(names)
        try:
            self._program: Any = library.Runtime.get().load_program(path)
            self._forward: Any = self._program.load_method("forward")
        except (RuntimeError, ValueError) as problem:
            raise ExportError(
                f"ExecuTorch cannot load '{path.name}'",
                where={"because": str(problem).splitlines()[0][:300]},
                hint="the file is damaged or incomplete: export it anew",
            ) from problem

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        try:
            output, *_ = self._forward.execute([row[name].cpu().contiguous() for name in self._names])
        except RuntimeError as problem:
            sizes = {name: tuple(row[name].shape) for name in self._names}
            raise ExportError(
                "ExecuTorch cannot run what was written",
                where={"inputs": sizes, "because": str(problem).splitlines()[0][:300]},
                hint="sizes above the bounds that it was written for are refused",
            ) from problem
        return scored(output, kind)

    def close(self) -> None:
        """Let go of the program."""
        self._forward = self._program = None
