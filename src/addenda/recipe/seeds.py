"""One recipe with several seeds: trained beside one another, and how far their figures lie apart."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from addenda.errors import AddendaError
from addenda.evals.record import SeedFacts, SeedFigure
from addenda.evals.report import write_report
from addenda.intervals import interval_of_mean
from addenda.recipe.folder import (
    ADAPTER,
    ENVIRONMENT,
    METRICS,
    RECIPE,
    RECORD,
    REPORT,
    SUMMARY,
    RunSummary,
    clear,
    require_place,
    write_json,
    write_text,
)
from addenda.recipe.joint import open_shared, run_shared
from addenda.recipe.prepare import Note, OnRunEvent
from addenda.settings import Recipe, resolve
from addenda.train import lock_run

__all__ = ["SEEDS", "run_seeds", "summed_up"]

SEEDS = "seeds"
"""Folder in that of a run: a run folder for each seed."""

_FIGURES = {
    "heldout_nll_after": "held-out nll, nats per trained token",
    "heldout_token_accuracy_after": "held-out tokens that are right, share",
    "base_kl_general": "moved from the base on general prompts, KL in nats per token",
}


def run_seeds(
    recipe: Recipe, on_event: OnRunEvent, *, resume: bool = False, force: bool = False, command: str = ""
) -> RunSummary:
    """Train a recipe with ``train.seeds`` seeds on the same rows, several at once where that works.

    Each seed has a run folder of its own in ``seeds/``; the run's folder holds what the first one left, and in summary,
    record and report the figures over all. A seed that fails is named there.

    Args:
        recipe: with its folder.
        on_event: told of progress and notes.
        resume: go on with the run in the folder.
        force: replace the run in the folder.
        command: the command line, for the reports.

    Raises:
        AddendaError: the first seed ended early; the others are in their folders.
        BusyError, ConfigError, DataError: as for one run.
    """
    folder = Path(recipe.out or "")
    require_place(folder, resume=resume, force=force)
    with lock_run(folder):
        require_place(folder, resume=resume, force=force)
        own = {seed: _recipe_of(recipe, seed) for seed in _seeds(recipe)}
        begun = resolve(file=folder / RECIPE) if resume else None
        shared = open_shared(list(own.values()), on_event, begun=begun)
        own = {seed: shared.completed(one) for seed, one in own.items()}
        if not resume:
            clear(folder)
            write_text(folder / RECIPE, shared.completed(recipe).to_toml())
        found: dict[int, RunSummary | AddendaError] = {}
        for places in shared.groups(list(own.values()), None):
            group = {seed: own[seed] for seed in [list(own)[place] for place in places]}
            on_event(Note(f"training with seed {', '.join(map(str, group))}"))
            results = run_shared(shared, list(group.values()), on_event, command=command)
            found.update(zip(group, results, strict=True))
        return summed_up(folder, found)


def _seeds(recipe: Recipe) -> range:
    return range(recipe.train.seed, recipe.train.seed + recipe.train.seeds)


def _recipe_of(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with one seed alone, on the held-out rows of the first one."""
    first = recipe.train.seed
    derived = {
        "out": str(Path(recipe.out or "") / SEEDS / f"seed-{seed}"),
        "name": recipe.name if seed == first else f"{recipe.name}-seed-{seed}",
        "train.seed": seed,
        "train.seeds": 1,
    }
    if recipe.data.heldout_seed is None:
        derived["data.heldout_seed"] = first
    for key, value in derived.items():
        recipe = recipe.derive(key, value, "one of several seeds")
    return recipe


def summed_up(folder: Path, found: Mapping[int, RunSummary | AddendaError]) -> RunSummary:
    """Put what the first seed left, and the figures over all, into the folder of the run."""
    done = {seed: one for seed, one in found.items() if isinstance(one, RunSummary)}
    failed = {seed: one for seed, one in found.items() if isinstance(one, AddendaError)}
    first = min(found)
    if first in failed:
        raise failed[first]
    facts = SeedFacts(
        tuple(done),
        tuple(_figure(key, name, [one.figures for one in done.values()]) for key, name in _FIGURES.items()),
        {str(seed): error.message for seed, error in failed.items()},
    )
    one = done[first]
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    shutil.copytree(one.folder / ADAPTER, folder / ADAPTER)
    for name in (ENVIRONMENT, METRICS):
        shutil.copyfile(one.folder / name, folder / name)
    record = dataclasses.replace(one.record, name=folder.name, seeds=facts)
    figures = {**one.figures, "seeds": _document(facts)}
    write_text(folder / RECORD, record.to_json() + "\n")
    write_report(folder / REPORT, record)
    write_json(folder / SUMMARY, figures)
    return dataclasses.replace(one, folder=folder, figures=figures, record=record)


def _figure(key: str, name: str, figures: list[dict[str, Any]]) -> SeedFigure:
    values = tuple(float(each[key]) for each in figures)
    return SeedFigure(name, key, values, interval_of_mean(values))


def _document(facts: SeedFacts) -> dict[str, Any]:
    figures = {
        figure.key: {
            "mean": figure.mean.value,
            "interval": None if figure.mean.low is None else [figure.mean.low, figure.mean.high],
            "values": list(figure.values),
        }
        for figure in facts.figures
    }
    return {"seeds": list(facts.seeds), "failed": facts.failed, **figures}
