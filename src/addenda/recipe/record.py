"""The record of a run, put together from what was prepared, trained and measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from addenda.core import fingerprint
from addenda.evals import record as facts
from addenda.evals.results import SamplePair
from addenda.evals.suite import Evaluation
from addenda.recipe.prepare import Prepared
from addenda.train import TrainResult, peak_memory_bytes, read_metrics

__all__ = ["environment", "make_record", "versions"]

_VERSIONS = ("addenda", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """The machine and the versions that a run depends on."""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "platform": platform.platform(),
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "variables": {
            key: os.environ[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ
        },
    }


def versions() -> dict[str, str]:
    """The versions of the packages that decide a result."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def make_record(
    ready: Prepared,
    result: TrainResult,
    measured: Evaluation,
    samples: list[SamplePair],
    *,
    run_folder: Path,
    wall_seconds: float,
    command: str,
    processes: int,
) -> facts.RunRecord:
    """Put the record together; the adapter and the metrics are in ``run_folder`` already."""
    machine = environment()
    described = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['memory_bytes'] / 2**30:.1f} GiB"
        + (f"; trained on '{torch.cuda.get_device_name()}'" if ready.base.model.device.type == "cuda" else "")
        + (f"; {processes} processes like this one" if processes > 1 else "")
    )
    assert measured.learning is not None  # training rows are always given
    return facts.RunRecord(
        name=run_folder.name,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        version=versions()["addenda"],
        base=_base_facts(ready),
        method=_method_facts(ready, run_folder),
        heldout=measured.heldout,
        learning=measured.learning,
        curves=_curves(run_folder, result),
        general=measured.general,
        samples=tuple(samples),
        data=_data_facts(ready),
        cost=facts.CostFacts(
            wall_seconds=wall_seconds,
            train_seconds=result.seconds,
            tokens_per_second=result.tokens_per_second,
            trained_tokens=result.trained_tokens,
            steps=result.steps,
            epochs=result.epochs,
            peak_rss_bytes=peak_memory_bytes()["rss"],
            machine=described,
            precision=f"{ready.precision.name}: {ready.precision.reason}",
        ),
        environment={**machine["versions"], "platform": machine["platform"]},
        recipe=tuple(
            facts.RecipeValue(key, "unset" if value is None else str(value), str(ready.recipe.origin(key)))
            for key, value in ready.recipe.values().items()
        ),
        command=command,
    )


def _base_facts(ready: Prepared) -> facts.BaseFacts:
    base = ready.base
    return facts.BaseFacts(
        name=base.name,
        source=base.source,
        license=base.license,
        kind=base.kind,
        dtype=ready.precision.name,
        parameters=ready.plan.base_parameters,
        fingerprint=fingerprint(base.model),
        notes=base.notes,
    )


def _method_facts(ready: Prepared, folder: Path) -> facts.MethodFacts:
    method = ready.recipe.method
    return facts.MethodFacts(
        name=method.name,
        summary=(type(method).__doc__ or "").strip().splitlines()[0],
        settings={
            key: value if isinstance(value, (str, int, float, type(None))) else str(value)
            for key, value in method.settings().items()
        },
        layers=tuple(
            facts.LayerFacts(row.path, row.kind, row.weight_shape, row.parameters, row.bytes)
            for row in ready.plan.rows
        ),
        trainable_parameters=ready.handle.trainable_parameters,
        total_parameters=ready.plan.base_parameters + ready.handle.trainable_parameters,
        adapter_bytes=sum(path.stat().st_size for path in (folder / "adapter").iterdir()),
    )


def _curves(folder: Path, result: TrainResult) -> facts.Curves:
    lines = read_metrics(folder / "metrics.jsonl")
    return facts.Curves(
        train=tuple(
            facts.CurvePoint(line["step"] - 1, line["loss"]) for line in lines if line["event"] == "step"
        ),
        heldout=tuple(
            facts.CurvePoint(entry["step"], entry["metrics"]["nll_per_token"]) for entry in result.history
        ),
        kept_step=result.best_step,
        stopped="the held-out loss no longer fell" if result.stopped_early else "all steps were done",
    )


def _data_facts(ready: Prepared) -> facts.DataFacts:
    data = ready.dataset
    return facts.DataFacts(
        source=data.name,
        sha256=data.sha256,
        shape=data.shape,
        rows=data.row_count,
        train_rows=len(ready.train.examples),
        heldout_rows=len(ready.heldout.examples),
        split=ready.split.note,
        dropped_rows=ready.train.dropped + ready.heldout.dropped,
        cut_rows=ready.train.cut + ready.heldout.cut,
        max_tokens=ready.recipe.data.max_tokens or 0,
        trained_tokens=ready.train.trained_tokens,
        all_tokens=ready.train.tokens,
        findings=tuple(_finding_counts(ready)),
    )


def _finding_counts(ready: Prepared) -> Iterator[facts.FindingCount]:
    parts = [ready.dataset.report, ready.train.report, ready.heldout.report]
    parts += [ready.dataset.valid.report] if ready.dataset.valid else []
    for report in parts:
        first: dict[str, Any] = {}
        for finding in report:
            first.setdefault(finding.code, finding)
        for code, count in report.counts.items():
            yield facts.FindingCount(code, first[code].severity, count, str(first[code]))
