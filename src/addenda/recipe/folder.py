"""The folder of a run: whether it may be used, what is in it from the start, and what a finished run leaves there."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.core import save
from addenda.errors import BusyError, NotFoundError
from addenda.evals.record import RunRecord
from addenda.evals.report import write_report
from addenda.evals.results import HeldoutMetrics, SamplePair
from addenda.evals.samples import sample_pairs
from addenda.evals.suite import Evaluation, evaluate
from addenda.recipe.prepare import START, Note, OnRunEvent, Prepared
from addenda.recipe.record import environment, make_record, versions
from addenda.train import (
    Event,
    MetricsLog,
    OnEvent,
    StepProfile,
    StepTimes,
    TrainResult,
    peak_memory_bytes,
    train,
)

__all__ = [
    "ADAPTER",
    "ENVIRONMENT",
    "METRICS",
    "RECIPE",
    "RECORD",
    "REPORT",
    "SUMMARY",
    "RunSummary",
    "begin_folder",
    "clear",
    "finish_folder",
    "identity_of",
    "logged_events",
    "require_place",
    "run_prepared",
    "train_prepared",
    "write_json",
    "write_text",
]

RECIPE, SUMMARY, REPORT, ADAPTER = "recipe.resolved.toml", "summary.json", "report.html", "adapter"
METRICS, ENVIRONMENT, RECORD = "metrics.jsonl", "environment.json", "record.json"
PROFILE = "profile.json"


@dataclass(frozen=True)
class RunSummary:
    """What a run left behind."""

    folder: Path
    figures: dict[str, Any]
    """The content of ``summary.json``."""
    record: RunRecord
    heldout: HeldoutMetrics
    """Of the held-out rows with the adapter, row by row."""
    profile: StepTimes | None = None
    """Where the time of a step went, if that was asked for and the run had steps enough."""


def run_prepared(
    ready: Prepared,
    on_event: OnRunEvent,
    *,
    started: float,
    resume: bool,
    command: str = "",
    profile: bool = False,
    processes: int = 1,
) -> RunSummary:
    """Train, measure and record in the recipe's folder, which is the caller's; arguments as for `run`.

    Args:
        ready: what is trained, its adapter acting alone.
        on_event: told of everything.
        started: when this part of the run began, by `time.monotonic`.
        resume: go on with what the folder holds.
        command: the command line, for the report.
        profile: measure where the time of a few steps goes.
        processes: how many train together.
    """
    folder = Path(ready.recipe.out or "")
    if not resume:
        begin_folder(ready, folder)
    logged = logged_events(folder, on_event)
    with StepProfile(ready.handle, logged) as profiled:
        result = train_prepared(ready, folder, profiled if profile else logged, resume=resume)
    summary = finish_folder(ready, result, on_event, started=started, command=command, processes=processes)
    if profiled.times is not None:
        write_json(folder / PROFILE, profiled.times.document())
    return dataclasses.replace(summary, profile=profiled.times)


def begin_folder(ready: Prepared, folder: Path) -> None:
    """Write what a run goes by before its first step."""
    write_text(folder / RECIPE, ready.recipe.to_toml())
    write_json(folder / ENVIRONMENT, environment())
    if ready.recipe.method.needs():
        save(ready.base.model, folder / START, name=ready.handle.name)


def finish_folder(
    ready: Prepared,
    result: TrainResult,
    on_event: OnRunEvent,
    *,
    started: float,
    command: str = "",
    processes: int = 1,
    together: int = 1,
) -> RunSummary:
    """Measure what was trained, and write adapter, record, report and summary; arguments as for `run_prepared`.

    ``together`` is how many adapters were trained in the same passes: the seconds are those of all of them.
    """
    folder = Path(ready.recipe.out or "")
    measured = _evaluate(ready, on_event)
    samples = _samples(ready, on_event)
    wall = time.monotonic() - started + result.seconds_before
    figures = {**_figures(ready, result, measured, wall), "processes": processes, "together": together}
    figures["forecast"] = ready.forecast
    save(ready.base.model, folder / ADAPTER, name=ready.handle.name, provenance=_provenance(ready, figures))
    record = make_record(
        ready,
        result,
        measured,
        samples,
        run_folder=folder,
        wall_seconds=wall,
        command=command,
        processes=processes,
    )
    write_text(folder / RECORD, record.to_json() + "\n")
    write_report(folder / REPORT, record)
    write_json(folder / SUMMARY, figures)
    return RunSummary(folder, figures, record, measured.adapted)


def require_place(folder: Path, *, resume: bool, force: bool, holds: str = RECIPE) -> None:
    """Refuse a folder that holds something else, or a run that is neither gone on with nor replaced.

    Args:
        folder: the run folder.
        resume: go on with what is there.
        force: replace what is there.
        holds: the file by which a folder of ours is known.
    """
    there = [path.name for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
    ours = holds in there
    if resume and not ours:
        raise NotFoundError(
            f"there is no run to resume in '{folder}'", hint="leave out --resume to start one"
        )
    if folder.exists() and not folder.is_dir():
        raise BusyError(f"'{folder}' is a file", hint="choose another --out")
    if there and not resume and not (force and ours):
        hint = "--resume goes on with it, --force replaces it, --out names another folder"
        raise BusyError(
            f"'{folder}' is not empty",
            where={"holds": " ".join(sorted(there)[:8])},
            hint=hint if ours else "it holds no run; choose another --out",
        )


def clear(folder: Path) -> None:
    """Empty a folder of ours but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def logged_events(folder: Path, on_event: OnEvent) -> OnEvent:
    """Tell of events and write them into the folder's metrics."""
    log = MetricsLog(folder / METRICS)

    def both(event: Event) -> None:
        log(event)
        on_event(event)

    return both


def identity_of(ready: Prepared) -> dict[str, str]:
    """Return what a run that goes on must share with the one that began, beside its settings."""
    return {
        "data": ready.dataset.sha256,
        "chat template": str(ready.base.template_sha256),
        "tokenizer": ready.base.tokenizer_sha256,
    }


def train_prepared(ready: Prepared, folder: Path, on_event: OnEvent, *, resume: bool) -> TrainResult:
    """Train, in the folder given, and leave the best adapter on the base."""
    ready.dataset.verify()
    return train(
        ready.base,
        ready.handle,
        ready.train.examples,
        ready.heldout.examples,
        ready.recipe.train,
        run_dir=folder,
        on_event=on_event,
        resume=resume,
        identity=identity_of(ready),
    )


def _evaluate(ready: Prepared, on_event: OnRunEvent) -> Evaluation:
    return evaluate(
        ready.base,
        ready.handle,
        ready.heldout.examples,
        train_examples=ready.train.examples,
        seed=ready.recipe.train.seed,
        base_scores=ready.base_scores,
        on_progress=on_event,
    )


def _samples(ready: Prepared, on_event: OnRunEvent) -> list[SamplePair]:
    if ready.base.chat_template is None:
        on_event(Note("no answers before and after: the base has no chat template"))
        return []
    evals = ready.recipe.evals
    return sample_pairs(
        ready.base,
        ready.handle,
        ready.split.heldout,
        count=evals.samples,
        max_new_tokens=evals.max_new_tokens,
        on_progress=on_event,
    )


def _figures(ready: Prepared, result: TrainResult, measured: Evaluation, wall: float) -> dict[str, Any]:
    return {
        **measured.figures(),
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens_per_second,
        "steps": result.steps,
        "epochs": result.epochs,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        **{f"peak_{memory}_bytes": peak for memory, peak in peak_memory_bytes().items()},
        "trainable_parameters": ready.handle.trainable_parameters,
        "total_parameters": ready.plan.base_parameters + ready.handle.trainable_parameters,
        "train_rows": len(ready.train.examples),
        "train_seconds": result.seconds,
        "wall_seconds": wall,
    }


def _provenance(ready: Prepared, figures: Mapping[str, Any]) -> dict[str, Any]:
    base, data = ready.base, ready.dataset
    described = {key: value for key, value in base.describe().items() if key != "folder"}
    return {
        "base": {**described, "load": ready.recipe.base.source},
        "chat_template": base.chat_template,
        "template_sha256": base.template_sha256,
        "tokenizer_sha256": base.tokenizer_sha256,
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "shape": data.shape,
            "rows": data.row_count,
            "train_rows": len(ready.train.examples),
            "heldout_rows": len(ready.heldout.examples),
        },
        "method": ready.recipe.method.name,
        "seed": ready.recipe.train.seed,
        "versions": versions(),
        "recipe": {key: value for key, value in ready.recipe.values().items() if value is not None},
        "figures": dict(figures),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
