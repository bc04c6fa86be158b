"""A sweep: many trials of one recipe on the same rows, and which settings are best."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from addenda.core import Progress
from addenda.errors import AddendaError, ConfigError, TrainingError
from addenda.recipe.prepare import Note, OnRunEvent
from addenda.recipe.runner import RECIPE, clear, free_folder, require_place, run, write_json, write_text
from addenda.recipe.space import Axis, Point, Range, Source, grid, recipes_of, shown
from addenda.recipe.trials import Outcome, Standing, Trial, outcome_of, read_outcome, standings
from addenda.settings import Recipe, given_values
from addenda.toml import toml_value
from addenda.train import lock_run
from addenda.train.parallel import processes

__all__ = ["SWEEP_RECIPE", "Sweep", "SweepSummary", "sweep"]

SWEEP_RECIPE, TABLE, BEST, TRIALS = "sweep.toml", "sweep.json", "best.toml", "trials"


@dataclass(frozen=True)
class Sweep:
    """What to sweep over, and how."""

    source: Source
    """The recipe, all but what a trial sets."""
    axes: Sequence[Axis]
    search: Literal["grid", "optuna"] = "grid"
    """``grid`` runs every combination; ``optuna`` lets Optuna choose, by what the trials before have shown."""
    trials: int | None = None
    """How many a search runs; None: 20. A grid has as many as its values make."""

    def with_folder(self) -> Sweep:
        """The same with a folder, ``runs/DATA-sweep`` where none is named."""
        recipe = self.source.recipe(first_point(self.axes))
        if recipe.out is not None:
            return self
        flags = {**self.source.arguments["flags"], "out": str(free_folder(recipe.data.path, "sweep"))}
        source = Source({**self.source.arguments, "flags": flags})
        return Sweep(source, self.axes, self.search, self.trials)

    def to_toml(self) -> str:
        """The sweep as a recipe with a table ``[sweep]``: what ``addenda sweep --recipe`` reads."""
        lines = [
            f"{key} = {toml_value(value)}" for key, value in given_values(**self.source.arguments).items()
        ]
        lines += ["", "[sweep]", f"search = {toml_value(self.search)}"]
        lines += [] if self.trials is None else [f"trials = {self.trials}"]
        lines += ["", "[sweep.over]"]
        for axis in self.axes:
            spelled = str(axis).partition("=")[2] if isinstance(axis, Range) else axis.values
            lines.append(f"{axis.key} = {toml_value(spelled)}")
        return "\n".join(lines) + "\n"


def first_point(axes: Sequence[Axis]) -> Point:
    """Return the point of the first value of each setting, the lower end of a range."""
    return {axis.key: axis.low if isinstance(axis, Range) else axis.values[0] for axis in axes}


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep left behind."""

    folder: Path
    standings: list[Standing]
    """Best first."""
    seconds: float
    """Wall time of this call; of a resumed sweep without the parts before."""

    @property
    def best(self) -> Standing | None:
        """The trial with the lowest held-out nll; None where all ended early."""
        first = self.standings[0] if self.standings else None
        return first if first is not None and first.nll is not None else None

    @property
    def not_told_apart(self) -> list[Standing]:
        """The trials whose distance to the best one may be chance."""
        return [one for one in self.standings if one.nll and one is not self.best and not one.worse_than_best]

    def document(self) -> dict[str, Any]:
        """The content of ``sweep.json``."""
        return {
            "folder": str(self.folder),
            "best": self.best and self.best.outcome.trial.name,
            "best_recipe": None if self.best is None else str(self.folder / BEST),
            "not_told_apart_from_best": [one.outcome.trial.name for one in self.not_told_apart],
            "seconds": self.seconds,
            "trials": [one.document() for one in self.standings],
        }


def sweep(wanted: Sweep, *, on_event: OnRunEvent, resume: bool = False, force: bool = False) -> SweepSummary:
    """Run every trial, one that fails beside the others, and write which is best.

    Args:
        wanted: the sweep.
        on_event: told of progress, notes, and every step of every trial.
        resume: go on with the sweep in its folder; trials that are finished are read and not run again.
        force: replace the sweep in its folder.

    Raises:
        ConfigError: settings that do not fit, of all trials at once; nothing was read or loaded.
        BusyError: the folder is not empty, or another process works in it.
    """
    started = time.monotonic()
    wanted = wanted.with_folder()
    points = grid(wanted.axes)
    recipes = recipes_of(wanted.source, points)
    folder = Path(recipes[0].out or "")
    _require_one_process(recipes[0])
    require_place(folder, resume=resume, force=force, holds=SWEEP_RECIPE)
    trials = [_trial(number, *one) for number, one in enumerate(zip(points, recipes, strict=True), 1)]
    with lock_run(folder):
        require_place(folder, resume=resume, force=force, holds=SWEEP_RECIPE)
        if not resume:
            clear(folder)
            write_text(folder / SWEEP_RECIPE, wanted.to_toml())
        outcomes: list[Outcome] = []
        for outcome in _run(trials, on_event):
            outcomes.append(outcome)
            summary = SweepSummary(folder, standings(outcomes), time.monotonic() - started)
            _write(summary, name=recipes[0].name)
            on_event(Progress("sweep", len(outcomes), len(trials), "trials"))
    return summary


def _require_one_process(recipe: Recipe) -> None:
    if recipe.data.path == "-":
        raise ConfigError("a sweep reads its data again for each trial", hint="write the rows to a file")
    with processes() as parallel:
        if not parallel.alone:
            raise ConfigError(
                f"a sweep runs in one process, and there are {parallel.size}",
                hint="start it without torchrun",
            )


def _trial(number: int, point: Point, recipe: Recipe) -> Trial:
    name = f"trial-{number:03d}"
    folder = Path(recipe.out or "") / TRIALS / name
    own = recipe.derive("out", str(folder), "of the sweep").derive("name", name, "of the sweep")
    return Trial(name, point, own)


def _run(trials: Sequence[Trial], on_event: OnRunEvent) -> Iterator[Outcome]:
    for trial in trials:
        known = read_outcome(trial)
        if known is None:
            on_event(Note(f"{trial.name}: {shown(trial.point)}"))
            known = _outcome(trial, on_event)
            known.write()
        yield known


def _outcome(trial: Trial, on_event: OnRunEvent) -> Outcome:
    began = (trial.folder / RECIPE).is_file()
    try:
        summary = run(trial.recipe, on_event=on_event, resume=began)
    except AddendaError as failed:
        return Outcome(trial, None, {}, failed.message, again=not isinstance(failed, TrainingError))
    assert summary is not None  # there is one process
    return outcome_of(trial, summary)


def _write(summary: SweepSummary, *, name: str) -> None:
    write_json(summary.folder / TABLE, summary.document())
    if summary.best is not None:
        write_text(summary.folder / BEST, best_recipe(summary.best.outcome.trial, name).to_toml())


def best_recipe(trial: Trial, name: str) -> Recipe:
    """Return the recipe of a trial as one of its own: without the trial's folder, and with the usual name."""
    values: Mapping[str, Any] = {"out": None, "name": name}
    recipe = trial.recipe
    for key, value in values.items():
        recipe = recipe.derive(key, value, "as before the sweep")
    return recipe
