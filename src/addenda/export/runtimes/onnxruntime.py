"""ONNX Runtime on the CPU: opens a file and answers with what it computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.errors import ExportError
from addenda.export.onnx.packages import require
from addenda.export.onnx.writing import PAST, PRESENT
from addenda.export.probes import Kind, Row, scored
from addenda.export.runtime import Runtime

__all__ = ["Decoder", "ONNXRuntime", "Session"]


class Session:
    """One opened ONNX file.

    Args:
        path: the file; its ``.data`` is found beside it.
        threads: of the CPU that it computes on.

    Raises:
        ExportError: the file is damaged, or not one that ONNX Runtime reads.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        runtime = require("onnxruntime")
        self.name = f"ONNX Runtime {runtime.__version__}"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; what it finds unusual in a graph is no affair of the user's
        try:
            self._session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # each failure has a class of its own there
            raise ExportError(
                f"ONNX Runtime cannot open '{path.name}'",
                where={"because": str(problem).splitlines()[0][:300]},
                hint="the file is damaged or incomplete: export it anew",
            ) from problem
        self.inputs = {each.name: tuple(each.shape) for each in self._session.get_inputs()}
        """Names of the inputs with their shapes, a word where a dimension takes any size."""
        self.outputs = {each.name: tuple(each.shape) for each in self._session.get_outputs()}

    def run(self, row: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """Return all outputs by name for the inputs by name, on the CPU."""
        feeds = {name: value.detach().cpu().numpy() for name, value in row.items() if name in self.inputs}
        found = self._session.run(None, feeds, **options)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


class Decoder:
    """One sequence read by a model with a key-value cache, some tokens at a time.

    Example:
        ``Decoder(session).read(ids)`` gives the logits of a prompt; ``read`` again goes on after it.
    """

    def __init__(self, session: Session, **options: Any) -> None:
        self._session, self._options = session, options
        shapes = {name: shape for name, shape in session.inputs.items() if name.startswith(PAST)}
        self._cache = {name: torch.zeros(1, shape[1], 0, shape[3]) for name, shape in shapes.items()}
        self.length = 0
        """How many tokens have been read."""

    def read(self, ids: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) after each of the next tokens, ids (n,)."""
        total = self.length + len(ids)
        row = {
            "input_ids": ids[None],
            "attention_mask": ids.new_ones(1, total),
            "position_ids": torch.arange(self.length, total)[None],
        }
        found = self._session.run({**row, **self._cache}, **self._options)
        self._cache = {name: found[name.replace(PAST, PRESENT)] for name in self._cache}
        self.length = total
        return found["logits"][0]

    def answer(self, ids: Tensor, *, stop: Collection[int], max_new_tokens: int) -> list[int]:
        """Read a prompt, ids (n,), and return the likeliest token after each, up to one of ``stop``."""
        answer: list[int] = []
        logits = self.read(ids)
        while len(answer) < max_new_tokens and (token := int(logits[-1].argmax())) not in stop:
            answer.append(token)
            logits = self.read(torch.tensor([token]))
        return answer


class ONNXRuntime(Runtime):
    """ONNX Runtime with one file; a decoder reads a row in pieces, so that its cache takes part in every answer."""

    def __init__(self, session: Session) -> None:
        self.name, self._session = session.name, session

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        if not any(name.startswith(PAST) for name in self._session.inputs):
            return scored(next(iter(self._session.run(row).values())), kind)
        decoder = Decoder(self._session)
        return scored(torch.cat([decoder.read(piece) for piece in _pieces(row["input_ids"][0])]), kind)


def _pieces(ids: Tensor) -> list[Tensor]:
    """Cut a sequence as a prompt and what is generated after it: some tokens at once, the last ones by themselves."""
    prompt, rest = ids[: max(1, len(ids) - 4)], ids[max(1, len(ids) - 4) :]
    return [*prompt.split(32), *rest.split(1)]
