"""A graph that ONNX Runtime runs, on servers, phones and in browsers, with the adapter folded in where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from addenda.bases import LoadedBase
from addenda.bases.packed_layers import packed_layers
from addenda.core.packed_layers import packed_numel
from addenda.core.planning import Plan
from addenda.errors import BaseModelError, ExportError
from addenda.export.format import Format
from addenda.export.job import Job
from addenda.export.onnx.folding import folded
from addenda.export.onnx.writing import FILE, decoder_graph, graph_of, save
from addenda.export.runtime import Runtime
from addenda.export.runtimes.onnxruntime import ONNXRuntime, Session

__all__ = ["FORMAT", "ONNX"]


class ONNX(Format):
    """``model.onnx``: any batch, any length; decoders with their key-value cache."""

    types: ClassVar[tuple[str, ...]] = ("float32",)
    extra = "onnx"
    library = "onnx"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        found = []
        if packed_layers(model) and not planned.method.mergeable:
            found.append(
                f"method '{planned.method.name}' cannot be folded into weights, and the base's are packed"
            )
        if getattr(model, "is_quantized", False):
            found.append("the base keeps weights that another library quantized, which no graph can hold")
        return found

    def space(self, job: Job) -> int:
        numbers = sum(each.numel() for each in job.model.parameters()) + packed_numel(job.model)
        return 4 * numbers + 2**26

    def write(self, job: Job, folder: Path) -> None:
        _require_float32(job.model)
        with folded(job.handle):
            job.say("trace the model", 0, 1, "models")
            graph = _graph(job)
            job.say("trace the model", 1, 1, "models")
            save(graph, folder)
        if job.base:
            job.base.tokenizer.save_pretrained(folder)
            job.base.model.config.save_pretrained(folder)

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        return ONNXRuntime(Session(folder / FILE))


def _graph(job: Job) -> object:
    if job.probes.kind == "next-token":
        return decoder_graph(job.model)
    return graph_of(job.model, job.probes.rows)


def _require_float32(model: nn.Module) -> None:
    other = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {str(torch.float32)}
    if other:
        raise ExportError(
            f"the model's weights are {', '.join(sorted(other))}", hint="widen them first: model.float()"
        )


FORMAT = ONNX()
