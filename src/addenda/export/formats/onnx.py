"""A graph that ONNX Runtime runs, on servers, phones and in browsers, with the adapter folded in where it can be."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from addenda.bases import LoadedBase
from addenda.bases.packed_layers import packed_layers
from addenda.core.planning import Plan
from addenda.errors import ExportError
from addenda.export.caching import against_cache
from addenda.export.format import Format
from addenda.export.job import Job
from addenda.export.onnx.adapters import (
    SUFFIX,
    adapter_findings,
    make_switchable,
    meant_by,
    require_switchable,
    write_adapter,
)
from addenda.export.onnx.graph import own_name
from addenda.export.onnx.reading import findings, tensors_of
from addenda.export.onnx.rounding import to_half, to_int8
from addenda.export.onnx.usage import usage
from addenda.export.onnx.writing import FILE, decoder_graph, graph_of, save
from addenda.export.runtime import Runtime
from addenda.export.runtimes.onnxruntime import AdapterFile, ONNXRuntime, Session, SwitchedRuntime
from addenda.export.traceable import folded

__all__ = ["FORMAT", "ONNX"]

SWITCHABLE = "float32-adapter"
"""The type whose adapter is a file of its own, which ONNX Runtime takes or leaves with each call."""
_UNTRACED = {"reft": "orthogonalizes as it runs, for which ONNX has no operator"}


class ONNX(Format):
    """``model.onnx``: any batch, any length; decoders with their key-value cache."""

    types: ClassVar[tuple[str, ...]] = ("float32", "float16", "int8", SWITCHABLE)
    extra = "onnx"
    library = "onnx"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        method, found = planned.method, []
        if why := _UNTRACED.get(method.name):
            found.append(f"method '{method.name}' {why}")
        if method.positions:
            found.append(
                f"method '{method.name}' puts {method.positions} positions in front of each sequence"
            )
        if not method.mergeable:
            if packed_layers(model):
                found.append(
                    f"method '{method.name}' cannot be folded into weights, and the base's are packed"
                )
            elif getattr(base, "kind", "") == "causal-lm" and (why := against_cache(planned)):
                found.append(f"method '{method.name}' {why}, and a decoder reads it in pieces")
        if getattr(model, "is_quantized", False):
            found.append("the base keeps weights that another library quantized, which no graph can hold")
        return found

    def space(self, job: Job) -> int:
        return (4 if job.type == "float32" else 8) * job.numbers + 2**26

    def drifts(self, job: Job) -> bool:
        return job.type in {"float16", "int8"}

    def write(self, job: Job, folder: Path) -> None:
        _require_float32(job.model)
        if job.type == SWITCHABLE:
            require_switchable(job.handle)
        _write(job, folder, str(job.type))
        if job.base:
            job.base.tokenizer.save_pretrained(folder)
            job.base.model.config.save_pretrained(folder)

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        if job.type == SWITCHABLE:
            adapter = AdapterFile(folder / f"{job.handle.name}{SUFFIX}")
            return SwitchedRuntime(Session(folder / FILE), adapter)
        if not exact or not self.drifts(job):
            return ONNXRuntime(Session(folder / FILE))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".twin-") as twin:
            _write(job, Path(twin), "float32")
            return ONNXRuntime(Session(Path(twin) / FILE))

    def audit(self, job: Job, folder: Path) -> list[str]:
        if job.type == SWITCHABLE:
            of_adapter = adapter_findings(folder / f"{job.handle.name}{SUFFIX}", job.handle)
            return [*findings(folder / FILE, meant_by(job.handle)), *of_adapter]
        with folded(job.handle):
            return findings(folder / FILE, tensors_of(job.model))

    def usage(self, job: Job) -> str:
        return usage(job, adapter=job.handle.name if job.type == SWITCHABLE else "")


def _write(job: Job, folder: Path, type: str) -> None:
    """Trace the model and write its file in one of the format's types."""
    job.say("write the graph", 0, 1, "graphs")
    with nullcontext() if type == SWITCHABLE else folded(job.handle):
        decodes = job.probes.kind == "next-token"
        made = decoder_graph(job.model) if decodes else graph_of(job.model, job.probes.rows)
        if type == SWITCHABLE:
            values = make_switchable(made, job.handle)
            write_adapter(values, folder / f"{job.handle.name}{SUFFIX}")
        elif type != "float32":
            names = [name for name in made.graph.initializers if own_name(name) in tensors_of(job.model)]
            if type == "float16":
                to_half(made.graph, names)
            else:  # a decoder's states hold outliers, which inputs rounded to 8 bits would not outlive
                to_int8(made.graph, names, products=not decodes)
        save(made, folder)
    job.say("write the graph", 1, 1, "graphs")


def _require_float32(model: nn.Module) -> None:
    other = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {str(torch.float32)}
    if other:
        raise ExportError(
            f"the model's weights are {', '.join(sorted(other))}", hint="widen them first: model.float()"
        )


FORMAT = ONNX()
