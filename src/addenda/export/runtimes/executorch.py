"""ExecuTorch's own runtime, with XNNPACK, on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.errors import ExportError
from addenda.export.executorch.lowering import require_executorch
from addenda.export.packages import require
from addenda.export.probes import Kind, Row, scored
from addenda.export.runtime import Runtime

__all__ = ["Decoder", "DecoderRuntime", "ExecuTorchRuntime", "Program"]


class Program:
    """One program, loaded.

    Args:
        path: the file.

    Raises:
        ExportError: the file is damaged, or not one that ExecuTorch reads.
        MissingDependencyError: ExecuTorch is not installed.
    """

    def __init__(self, path: Path) -> None:
        library = require_executorch("runtime")
        version = require("executorch", "ExecuTorch programs", "executorch.version").__version__
        self.name = f"ExecuTorch {version}"
        try:
            self._program: Any = library.Runtime.get().load_program(path)
            self._forward: Any = self._program.load_method("forward")
        except (RuntimeError, ValueError) as problem:
            raise ExportError(
                f"ExecuTorch cannot load '{path.name}'",
                where={"because": str(problem).splitlines()[0][:300]},
                hint="the file is damaged or incomplete: export it anew",
            ) from problem

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run it once, and return its first output.

        Raises:
            ExportError: it cannot be run on these.
        """
        try:
            output, *_ = self._forward.execute([value.cpu().contiguous() for value in inputs])
        except RuntimeError as problem:
            raise ExportError(
                "ExecuTorch cannot run what was written",
                where={
                    "inputs": [tuple(value.shape) for value in inputs],
                    "because": str(problem).splitlines()[0][:300],
                },
                hint="sizes above the bounds that it was written for are refused",
            ) from problem
        found: Tensor = output
        return found

    def told(self) -> dict[str, list[Any]]:
        """Return what its methods without arguments give, by their names."""
        names = set(self._program.method_names) - {"forward"}
        return {name: list(self._program.load_method(name).execute([])) for name in sorted(names)}


class ExecuTorchRuntime(Runtime):
    """A program that is given each row as a whole.

    Args:
        path: the file.
        names: what its inputs are called in a row, in their order.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._program: Program | None = Program(path)
        self.name, self._names = self._program.name, tuple(names)

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        assert self._program is not None
        return scored(self._program.forward(*(row[name] for name in self._names)), kind)

    def close(self) -> None:
        """Let go of the program."""
        self._program = None


class Decoder:
    """One sequence read by a program with a key-value cache, some tokens at a time; a new one begins at place 0.

    Args:
        program: of which only the latest `Decoder` may be used: there is one cache.
    """

    def __init__(self, program: Program) -> None:
        self._program, self.length = program, 0

    def read(self, ids: Tensor) -> Tensor:
        """Return the logits (vocabulary,) after the last of the next tokens, ids (n,)."""
        total = self.length + len(ids)
        logits = self._program.forward(ids[None], torch.arange(self.length, total))
        self.length = total
        return logits[0, -1].clone()  # its memory is written again in the next call


class DecoderRuntime(Runtime):
    """A decoder that reads each row as an app would: a fifth of it in parts, the rest token by token.

    It tells the answer after each part and each token; the others are NaN.
    """

    def __init__(self, path: Path) -> None:
        self._program: Program | None = Program(path)
        self.name, told = self._program.name, self._program.told()
        self._part, self._context = told["get_max_seq_len"][0], told["get_max_context_len"][0]

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        assert self._program is not None
        decoder, ids, found = Decoder(self._program), row["input_ids"][0], {}
        for piece in pieces(ids[: self._context], self._part):
            logits = decoder.read(piece)
            found[decoder.length - 1] = logits
        answers = logits.new_full((len(ids), len(logits)), float("nan"))
        for place, logits in found.items():
            answers[place] = scored(logits, kind)[0]
        return answers

    def close(self) -> None:
        """Let go of the program."""
        self._program = None


def pieces(ids: Tensor, part: int) -> list[Tensor]:
    """Cut a sequence, ids (n,), into parts of at most ``part`` tokens for its first fifth, and tokens for the rest.

    Example:
        >>> [len(piece) for piece in pieces(torch.arange(34), 128)][:4]
        [4, 2, 1, 1]
    """
    prompt, rest = ids[: len(ids) // 5], ids[len(ids) // 5 :]
    longest = min(part, max(1, 2 * len(prompt) // 3))
    return [piece for piece in (*prompt.split(longest), *rest.split(1)) if len(piece)]
