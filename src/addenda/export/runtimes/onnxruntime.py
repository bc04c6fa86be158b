"""ONNX Runtime on the CPU: opens a file and answers with what it computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from addenda.errors import ExportError
from addenda.export.onnx.packages import require
from addenda.export.onnx.writing import PAST, PRESENT
from addenda.export.probes import Kind, Row, scored
from addenda.export.runtime import Runtime

__all__ = ["AdapterFile", "Decoder", "ONNXRuntime", "Session", "SwitchedRuntime"]


class AdapterFile:
    """One opened ``.onnx_adapter`` file, to be named in calls of a `Session`.

    Raises:
        ExportError: the file is damaged, or not one that ONNX Runtime reads.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        runtime = require("onnxruntime")
        self._mapped = runtime.LoraAdapter()  # kept: the options only point to it
        with _opening(path):
            self._mapped.Load(os.fspath(path))
        self.options = runtime.RunOptions()
        self.options.add_active_adapter(self._mapped)


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # each failure has a class of its own there
        raise ExportError(
            f"ONNX Runtime cannot open '{path.name}'",
            where={"because": str(problem).splitlines()[0][:300]},
            hint="the file is damaged or incomplete: export it anew",
        ) from problem


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
        with _opening(path):
            self._session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: tuple(each.shape) for each in self._session.get_inputs()}
        """Names of the inputs with their shapes, a word where a dimension takes any size."""
        made = self._session.get_overridable_initializers()
        self.overridable = {each.name: tuple(each.shape) for each in made}
        """Names of the inputs that have values of their own, with their shapes."""
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.outputs = {each.name: tuple(each.shape) for each in self._session.get_outputs()}

    def run(self, row: Mapping[str, Tensor], adapter: AdapterFile | None = None) -> dict[str, Tensor]:
        """Return all outputs by name for the inputs by name, on the CPU."""
        feeds = {name: value.detach().cpu().numpy() for name, value in row.items() if name in self.inputs}
        found = self._session.run(None, feeds, adapter.options if adapter else None)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


class Decoder:
    """One sequence read by a model with a key-value cache, some tokens at a time.

    Example:
        ``Decoder(session).read(ids)`` gives the logits of a prompt; ``read`` again goes on after it.
    """

    def __init__(self, session: Session, adapter: AdapterFile | None = None) -> None:
        self._session, self._adapter = session, adapter
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
        found = self._session.run({**row, **self._cache}, self._adapter)
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
        self._adapter: AdapterFile | None = None

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        adapter = self._adapter if adapted else None
        if not any(name.startswith(PAST) for name in self._session.inputs):
            return scored(next(iter(self._session.run(row, adapter).values())), kind)
        decoder = Decoder(self._session, adapter)
        return scored(torch.cat([decoder.read(piece) for piece in _pieces(row["input_ids"][0])]), kind)


class SwitchedRuntime(ONNXRuntime):
    """The same with an adapter's file, which is named or not in each call."""

    has_base = True

    def __init__(self, session: Session, adapter: AdapterFile) -> None:
        super().__init__(session)
        self._adapter = adapter


def _pieces(ids: Tensor) -> list[Tensor]:
    """Cut a sequence as a prompt and what is generated after it: some tokens at once, the last ones by themselves."""
    prompt, rest = ids[: max(1, len(ids) - 4)], ids[max(1, len(ids) - 4) :]
    return [*prompt.split(32), *rest.split(1)]
