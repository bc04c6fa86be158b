"""mlx-lm on the CPU: Apple's MLX, whose Linux build computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from addenda.errors import ExportError
from addenda.export.packages import require
from addenda.export.probes import Kind, Row, scored
from addenda.export.runtime import Runtime, TokenizerChat

__all__ = ["MLXRuntime"]


class MLXRuntime(Runtime):
    """A causal model that mlx-lm loaded.

    Args:
        model: folder of the model.
        adapter: folder of the adapter, if that is apart.

    Raises:
        ExportError: mlx-lm refuses a folder; with what it said.
        MissingDependencyError: mlx-lm is not installed.
    """

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        self._mx = require("mlx", "MLX's models and adapters", "mlx.core", "mlx_lm")
        library = require("mlx", "MLX's models and adapters", "mlx_lm")
        self.name = f"mlx-lm {library.__version__}"
        try:
            with self._mx.stream(self._mx.cpu):
                self._model, tokenizer = library.load(str(model), adapter_path=adapter and str(adapter))
        except Exception as problem:  # each failure has a class of its own there
            raise ExportError(
                "mlx-lm cannot load what was written",
                where={"because": " ".join(str(problem).split())[:300]},
                hint="nothing was written; it may not have this architecture, or name its layers otherwise",
            ) from problem
        self.chat = TokenizerChat(tokenizer._tokenizer, set(tokenizer.eos_token_ids))

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        ids = self._mx.array(row["input_ids"].tolist())
        with self._mx.stream(self._mx.cpu):
            found: Any = self._model(ids).astype(self._mx.float32)
            self._mx.eval(found)
        return scored(torch.from_numpy(np.array(found)), kind)

    def close(self) -> None:
        """Let go of the weights."""
        del self._model
