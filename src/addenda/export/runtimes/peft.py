"""PEFT itself, or, where it is not installed, our own reader of its folders."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from addenda.core.handle import Handle, handles
from addenda.export.peft.form import Form, form_for
from addenda.export.peft.reading import import_peft
from addenda.export.probes import Kind, Row, answer
from addenda.export.runtime import Runtime

__all__ = ["PEFTRuntime", "open_peft"]


def open_peft(handle: Handle, folder: Path) -> Runtime:
    """Load the folder onto the model that it was made from, whose own adapter rests meanwhile."""
    form = form_for(handle.method)
    why_not = "peft is not installed" if importlib.util.find_spec("peft") is None else ""
    if form is not None and form.why_unasked:
        why_not = form.why_unasked
    return OwnReader(handle, folder, why_not) if why_not else PEFTRuntime(handle, folder, form)


class PEFTRuntime(Runtime):
    """The model with the folder loaded by PEFT."""

    def __init__(self, handle: Handle, folder: Path, form: Form | None) -> None:
        import peft

        self.name = f"peft {peft.__version__}"
        self._form, self._resting = form, handle.disabled()
        self._resting.__enter__()
        with warnings.catch_warnings():
            # PEFT asks transformers for properties that transformers has renamed; nothing the user can act on.
            warnings.simplefilter("ignore", FutureWarning)
            self._theirs: Any = peft.PeftModel.from_pretrained(handle.model, folder)
        self._theirs.eval()

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        found = answer(self._theirs, row, kind)
        # PEFT scores virtual positions too.
        return found[-row["input_ids"].numel() :] if kind == "next-token" else found

    def close(self) -> None:
        """Give the model back as it was; a prompt has changed nothing of it, and adaption prompts go as they came."""
        if self._form is None or not self._form.of_model:
            if hasattr(self._theirs.base_model, "unload"):
                self._theirs.unload()
            else:
                self._theirs.base_model.delete_adapter("default")
        self._resting.__exit__(None, None, None)


class OwnReader(Runtime):
    """The model with the folder loaded by `import_peft`."""

    def __init__(self, handle: Handle, folder: Path, why: str) -> None:
        self.name = f"addenda's own reader ({why})"
        self._model, self._resting = handle.model, handle.disabled()
        self._resting.__enter__()
        self._again = import_peft(handle.model, folder, name="export-gate")

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        return answer(self._model, row, kind)

    def close(self) -> None:
        for name in (self._again.name, *self._again.method.mixes()):
            handles(self._model)[name].detach()
        self._resting.__exit__(None, None, None)
