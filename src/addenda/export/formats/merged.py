"""A model folder that transformers loads, with the adapter folded into the weights."""

from __future__ import annotations

import importlib.metadata
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from addenda.bases import LoadedBase, load_base
from addenda.bases.loaded import vocabulary_of
from addenda.core.foreign import quantized_numel
from addenda.core.planning import Plan
from addenda.errors import ExportError
from addenda.export.as_base import (
    AS_BASE,
    CAREFUL,
    Form,
    audit_as_base,
    own_form,
    unpacked_form,
    write_as_base,
)
from addenda.export.bitsandbytes import quantizer_of
from addenda.export.format import Format
from addenda.export.job import Job
from addenda.export.merged import merged_audit, write_merged
from addenda.export.runtime import ModelRuntime, Runtime

__all__ = ["FORMAT", "Merged"]

_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")
```"""
_PACKED = (AS_BASE, CAREFUL)
_NEEDS = """

It needs `pip install bitsandbytes accelerate`."""


class Merged(Format):
    """Safetensors, tokenizer and template of a model that needs no adapter any more."""

    types: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", *_PACKED)
    library = "transformers"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        found = []
        if not planned.method.mergeable:
            found.append(f"method '{planned.method.name}' cannot be merged")
        library = quantizer_of(model)
        if library not in {None, "bitsandbytes"}:
            found.append(
                f"the base keeps weights that {library} quantized, and folding would round them anew"
            )
        return found

    def default_type(self, job: Job) -> str | None:
        # The configuration keeps the dtype that was loaded, whatever the weights were widened to since.
        stored = str(getattr(getattr(job.model, "config", None), "dtype", None)).removeprefix("torch.")
        return stored if stored in self.types else "float32"

    def space(self, job: Job) -> int:
        tied = vocabulary_of(job.model) * 4096 if job.base else 0
        codes = quantized_numel(job.model)
        return (4 if job.type == "float32" else 6) * (job.numbers + tied + codes) + 2**24

    def write(self, job: Job, folder: Path) -> None:
        if form := _form(job):
            write_as_base(job, form, folder)
        else:
            _write(job, folder, str(job.type))

    def drifts(self, job: Job) -> bool:
        return job.type != "float32"

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        if not exact or job.type == "float32":
            packed = job.type in _PACKED
            return _opened(folder, " with bitsandbytes" if packed else "")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".twin-") as twin:
            self.write(replace(job, type="float32"), Path(twin))
            return _opened(Path(twin))

    def audit(self, job: Job, folder: Path) -> list[str]:
        if form := _form(job):
            return audit_as_base(form, folder)
        return merged_audit(job.handle, folder, getattr(torch, str(job.type)))

    def usage(self, job: Job) -> str:
        return _USAGE + (_NEEDS if job.type in _PACKED else "")


def _form(job: Job) -> Form | None:
    """What is made of the tensors of the base's folder, where the merge is written by it."""
    if job.type in _PACKED:
        return own_form(job)
    if job.base and quantizer_of(job.model):
        return unpacked_form(job, getattr(torch, str(job.type)))
    return None


def _write(job: Job, folder: Path, dtype: str) -> None:
    if job.base is None:
        raise ExportError(
            f"'{job.title}' has no form that transformers loads",
            hint="load it with addenda.load_base, or save its state",
        )
    write_merged(job.base, job.handle, folder, getattr(torch, dtype), on_progress=job.on_progress)


def _opened(folder: Path, beside: str = "") -> Runtime:
    name = f"transformers {importlib.metadata.version('transformers')}{beside}"
    return ModelRuntime(name, load_base(folder, dtype=torch.float32).model)


FORMAT = Merged()
