"""A program that ExecuTorch runs on phones and small devices, through XNNPACK, with the adapter folded in."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.stepwise import keeps_keys
from addenda.core.layers import kind_of, layer_at
from addenda.core.planning import Plan
from addenda.export.caching import against_cache
from addenda.export.executorch.decoding import CONTEXT, facts, write_decoder
from addenda.export.executorch.lowering import BATCH, LENGTH, bounds_of, write_program
from addenda.export.executorch.reading import findings
from addenda.export.executorch.usage import usage_of_decoder, usage_of_whole
from addenda.export.format import Format
from addenda.export.job import Job
from addenda.export.probes import named_output
from addenda.export.runtime import Runtime
from addenda.export.runtimes.executorch import DecoderRuntime, ExecuTorchRuntime
from addenda.export.traceable import folded

__all__ = ["FORMAT", "ExecuTorch"]

FILE = "model.pte"


class ExecuTorch(Format):
    """``model.pte``: any batch and length up to a bound; decoders with their key-value cache."""

    types: ClassVar[tuple[str, ...]] = ("float32", "int8")
    extra = "executorch"
    library = "executorch"
    has_context = True

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        found = []
        if planned.method.positions:
            found.append(
                f"method '{planned.method.name}' puts {planned.method.positions} positions in front of each sequence"
            )
        if base is not None and base.kind == "causal-lm":
            if not keeps_keys(model):
                kind = base.model.config.model_type
                found.append(f"a model of kind '{kind}' keeps more than a key and a value for each token")
            if not planned.method.mergeable and (why := against_cache(planned)):
                found.append(f"method '{planned.method.name}' {why}, and a decoder reads it in pieces")
        if getattr(model, "is_quantized", False):
            found.append("the base keeps weights that another library quantized, which no program can hold")
        return found

    def space(self, job: Job) -> int:
        return (4 if job.type == "float32" else 8) * job.numbers + 2**26

    def drifts(self, job: Job) -> bool:
        return job.type == "int8"

    def write(self, job: Job, folder: Path) -> None:
        _write(job, folder, int8=job.type == "int8")
        if job.base:
            job.base.tokenizer.save_pretrained(folder)
            job.base.model.config.save_pretrained(folder)

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        if not exact or not self.drifts(job):
            return _opened(job, folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".twin-") as twin:
            _write(job, Path(twin), int8=False)
            return _opened(job, Path(twin))

    def audit(self, job: Job, folder: Path) -> list[str]:
        if job.type == "int8":
            return []
        before, heard = _weights(job), _heard(job)
        with folded(job.handle):
            meant = {path: weight for path, weight in _weights(job).items() if path in heard}
            return findings(folder / FILE, meant, before)

    def usage(self, job: Job) -> str:
        return usage_of_decoder(job, _context(job)) if _decodes(job) else usage_of_whole(job, _bounds(job))


def _decodes(job: Job) -> bool:
    """Whether it is a causal model of transformers, for which there are caches; others are run whole."""
    return job.probes.kind == "next-token" and hasattr(job.model, "generate")


def _context(job: Job) -> int:
    return job.context or min(_room(job), CONTEXT)


def _room(job: Job) -> int:
    config = getattr(job.model, "config", None)
    room: int = job.base.room if job.base else getattr(config, "max_position_embeddings", LENGTH)
    return room


def _opened(job: Job, folder: Path) -> Runtime:
    if _decodes(job):
        return DecoderRuntime(folder / FILE)
    return ExecuTorchRuntime(folder / FILE, list(job.probes.rows[0]))


def _bounds(job: Job) -> dict[str, dict[int, tuple[str, int]]]:
    batch = 1 if job.probes.kind == "next-token" else BATCH  # its output has a vocabulary for every position
    return bounds_of(job.probes.rows, batch=batch, length=min(_room(job), LENGTH))


def _write(job: Job, folder: Path, *, int8: bool) -> None:
    job.say("write the program", 0, 1, "programs")
    with folded(job.handle):
        if _decodes(job):
            told = facts(job.model, job.base)
            write_decoder(job.model, folder / FILE, context=_context(job), int8=int8, told=told)
        else:
            write_program(
                job.model, job.probes.rows, _bounds(job), folder / FILE, int8=int8, seen=job.calibration
            )
    job.say("write the program", 1, 1, "programs")


def _weights(job: Job) -> dict[str, Tensor]:
    """The weights of the adapted linear layers; those of a convolution take in the norm behind it."""
    if not job.handle.method.mergeable:
        return {}
    layers: dict[str, Any] = {path: layer_at(job.model, path) for path in job.handle.paths}
    linear = {
        path: layer for path, layer in layers.items() if getattr(kind_of(layer), "name", "") == "linear"
    }
    return {path: layer.weight.detach().clone() for path, layer in linear.items() if hasattr(layer, "weight")}


def _heard(job: Job) -> set[str]:
    """The layers on whose adapters the answer depends: the others, such as an unused pooler's, are left out of it."""
    adapters = {path: list(adapter.parameters()) for path, adapter in job.handle.adapters.items()}
    frozen = [p for each in adapters.values() for p in each if not p.requires_grad]
    row = min(job.probes.rows, key=lambda row: sum(value.numel() for value in row.values()))
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            total = named_output(job.model(**row))[1].sum()
        every = [p for each in adapters.values() for p in each]
        found = torch.autograd.grad(total, every, allow_unused=True)
        heard = {id(p) for p, gradient in zip(every, found, strict=True) if gradient is not None}
        return {path for path, each in adapters.items() if any(id(p) in heard for p in each)}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


FORMAT = ExecuTorch()
