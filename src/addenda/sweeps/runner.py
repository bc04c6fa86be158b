"""A sweep: many trials of one recipe on the same rows, and which settings are best."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from addenda.core import Progress
from addenda.errors import AddendaError, ConfigError, DataError, TrainingError, nearest
from addenda.recipe.folder import RECIPE, clear, require_place, write_json, write_text
from addenda.recipe.joint import MOST_TOGETHER, Shared, open_shared, run_shared
from addenda.recipe.prepare import Note, OnRunEvent
from addenda.recipe.runner import free_folder
from addenda.settings import BaseSettings, Recipe, given_values, resolve
from addenda.sweeps.search import Grid, OptunaSearch, Search
from addenda.sweeps.space import Axis, Point, Range, Source, recipes_of, shown
from addenda.sweeps.trials import Outcome, Standing, Trial, read_outcome, standings
from addenda.toml import read_table, toml_value
from addenda.train import lock_run
from addenda.train.parallel import processes

__all__ = [
    "SWEEP_RECIPE",
    "Sweep",
    "SweepPlan",
    "SweepSummary",
    "TrialPlan",
    "plan_sweep",
    "read_sweep_table",
    "sweep",
]

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
    """How many a search runs; None: `addenda.sweeps.search.TRIALS`. A grid has as many as its values make."""
    together: int | None = None
    """The most trials trained at once; None: as many as memory holds, `addenda.recipe.joint.MOST_TOGETHER` at most."""

    def __post_init__(self) -> None:
        found = []
        if self.search not in ("grid", "optuna"):
            found.append(f"search must be grid or optuna, got '{self.search}'")
        if self.search == "grid" and self.trials is not None:
            found.append(
                "a grid has as many trials as its values make: leave out trials, or search with optuna"
            )
        for name in ("trials", "together"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                found.append(f"{name} must be a whole number of at least 1, got {value!r}")
        if found:
            raise ConfigError("; ".join(found), hint="see 'addenda sweep --help'")

    def begin(self) -> tuple[Sweep, Search, list[Recipe]]:
        """Check everything that can be checked before data and base are read.

        Returns:
            The sweep with its folder, the search, and recipes of points that it may ask for.

        Raises:
            ConfigError: settings that do not fit, of all trials at once.
            MissingDependencyError: Optuna is not installed.
        """
        first = {axis.key: axis.low if isinstance(axis, Range) else axis.values[0] for axis in self.axes}
        search: Search
        if self.search == "grid":
            search = Grid(self.axes)
            recipes = recipes_of(self.source, search.samples())
        else:
            [recipe] = recipes_of(self.source, [first])
            at_once = self.together or MOST_TOGETHER
            search = OptunaSearch(self.axes, trials=self.trials, at_once=at_once, seed=recipe.train.seed)
            recipes = recipes_of(self.source, search.samples())
        _require_one_process(recipes[0])
        if recipes[0].out is not None:
            return self, search, recipes
        out = str(free_folder(recipes[0].data.path, "sweep"))
        flags = {**self.source.arguments.get("flags", {}), "out": out}
        wanted = replace(self, source=Source({**self.source.arguments, "flags": flags}))
        return wanted, search, [recipe.derive("out", out, "data, the first free name") for recipe in recipes]

    def to_toml(self) -> str:
        """The sweep as a recipe with a table ``[sweep]``: what ``addenda sweep --recipe`` reads."""
        lines = [
            f"{key} = {toml_value(value)}" for key, value in given_values(**self.source.arguments).items()
        ]
        lines += ["", "[sweep]", f"search = {toml_value(self.search)}"]
        for name in ("trials", "together"):
            value = getattr(self, name)
            lines += [] if value is None else [f"{name} = {value}"]
        lines += ["", "[sweep.over]"]
        for axis in self.axes:
            spelled = str(axis).partition("=")[2] if isinstance(axis, Range) else axis.values
            lines.append(f"{axis.key} = {toml_value(spelled)}")
        return "\n".join(lines) + "\n"


_TABLE_KEYS = ("over", "search", "together", "trials")


def read_sweep_table(path: Path) -> dict[str, Any]:
    """Return the table ``[sweep]`` of a recipe; empty where it has none.

    Raises:
        ConfigError: it holds keys that a sweep does not have, all of them named, or ``over`` is no table.
        NotFoundError: there is no such file.
    """
    held = read_table(path, "sweep")
    wrong = {f"sweep.{key}": _unknown(key) for key in held if key not in _TABLE_KEYS}
    if not isinstance(held.get("over", {}), Mapping):
        wrong["sweep.over"] = "must be a table of settings with their values"
    if wrong:
        raise ConfigError(
            f"the table [sweep] of '{path}' cannot be used",
            where=wrong,
            hint='what to try stands in [sweep.over], such as "method.rank" = [4, 16]',
        )
    return held


def _unknown(key: str) -> str:
    near = nearest(key, _TABLE_KEYS, count=1)
    return (
        f"unknown key; did you mean '{near[0]}'?" if near else f"unknown key; known: {' '.join(_TABLE_KEYS)}"
    )


def _require_one_process(recipe: Recipe) -> None:
    if recipe.data.path == "-":
        raise ConfigError("a sweep that is resumed reads its data again", hint="write the rows to a file")
    if recipe.train.seeds > 1:
        raise ConfigError(
            f"a trial has one seed, and train.seeds is {recipe.train.seeds}",
            hint="train the best recipe with several seeds afterwards",
        )
    with processes() as parallel:
        if not parallel.alone:
            raise ConfigError(
                f"a sweep runs in one process, and there are {parallel.size}",
                hint="start it without torchrun",
            )


@dataclass(frozen=True)
class TrialPlan:
    """What one trial will take."""

    point: Point
    seconds: float | None
    """Foretold, of the training, evaluations within it included; None where that cannot be done."""
    bytes: int | None
    """Memory foretold, by itself."""
    together: int
    """How many are trained at once, this one among them."""
    reason: str = ""
    """Why it cannot be run."""


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will take."""

    search: str
    trials: int
    """How many there are."""
    shown: list[TrialPlan]
    """Of a grid all; of a search the ends of what it may choose."""

    @property
    def seconds(self) -> float | None:
        """Foretold, of all trainings one after another; None where that cannot be done."""
        known = [one.seconds for one in self.shown if one.seconds is not None]
        return sum(known) / len(known) * self.trials if known else None

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "search": self.search,
            "trials": self.trials,
            "seconds": self.seconds,
            "shown": [
                {
                    "settings": dict(one.point),
                    "seconds": one.seconds,
                    "bytes": one.bytes,
                    "together": one.together,
                    "reason": one.reason,
                }
                for one in self.shown
            ],
        }


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep left behind."""

    folder: Path
    standings: list[Standing]
    """Best first."""
    seconds: float
    """Wall time of this call; of a resumed sweep without the parts before."""
    foretold: float | None
    """What the trainings were to take one after another, measuring and reports not included; None if resumed."""

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
            "foretold_seconds": self.foretold,
            "trials": [one.document() for one in self.standings],
        }


def plan_sweep(wanted: Sweep, on_event: OnRunEvent) -> SweepPlan:
    """Work out what a sweep would take; nothing is trained or written, and no weights are loaded.

    Raises:
        ConfigError: settings that do not fit, of all trials at once.
        DataError: the data has errors.
    """
    wanted, search, recipes = wanted.begin()
    return _plan(wanted, search, _Families(recipes, on_event))


def sweep(
    wanted: Sweep, *, on_event: OnRunEvent, resume: bool = False, force: bool = False, command: str = ""
) -> SweepSummary:
    """Run every trial, one that fails beside the others, and write which is best.

    Args:
        wanted: the sweep.
        on_event: told of progress and notes.
        resume: go on with the sweep in its folder; trials that are finished are read and not run again.
        force: replace the sweep in its folder.
        command: the command line, for the reports.

    Raises:
        ConfigError: settings that do not fit, of all trials at once; nothing was read or loaded.
        DataError: the data has errors; nothing was loaded.
        BusyError: the folder is not empty, or another process works in it.
    """
    started = time.monotonic()
    wanted, search, recipes = wanted.begin()
    folder = Path(recipes[0].out or "")
    require_place(folder, resume=resume, force=force, holds=SWEEP_RECIPE)
    with lock_run(folder):
        require_place(folder, resume=resume, force=force, holds=SWEEP_RECIPE)
        families = _Families(recipes, on_event)
        foretold = None
        if not resume:
            foretold = _plan(wanted, search, families).seconds
            clear(folder)
        # Of a resumed sweep too: it may have more trials than before.
        write_text(folder / SWEEP_RECIPE, wanted.to_toml())
        outcomes: list[Outcome] = []
        on_event(Progress("sweep", 0, search.total, "trials"))
        while points := search.ask():
            trials = [_trial(folder, len(outcomes) + more, point) for more, point in enumerate(points, 1)]
            found: dict[str, Outcome] = {}
            for outcome in _run(trials, wanted, families, on_event, command):
                found[outcome.trial.name] = outcome
                summary = SweepSummary(
                    folder,
                    standings([*outcomes, *found.values()]),
                    time.monotonic() - started,
                    foretold,
                )
                _write(summary, wanted)
                on_event(Progress("sweep", len(outcomes) + len(found), search.total, "trials"))
            outcomes += [found[trial.name] for trial in trials]
            search.tell([outcome.loss for outcome in outcomes[-len(trials) :]])
    return summary


def _trial(folder: Path, number: int, point: Point) -> Trial:
    name = f"trial-{number:03d}"
    return Trial(name, point, folder / TRIALS / name)


class _Families:
    """Rows and base for each way in which the recipes of a sweep hold the base; one base is loaded at a time."""

    def __init__(self, recipes: Sequence[Recipe], on_event: OnRunEvent) -> None:
        self._recipes = recipes
        self._on_event = on_event

    @functools.cached_property
    def _open(self) -> Mapping[BaseSettings, Shared | AddendaError]:
        """Read and timed when first needed: a sweep that is finished needs nothing."""
        found: dict[BaseSettings, Shared | AddendaError] = {}
        for base in dict.fromkeys(recipe.base for recipe in self._recipes):
            try:
                own = [recipe for recipe in self._recipes if recipe.base == base]
                found[base] = open_shared(own, self._on_event, begun=_begun(own[0]))
            except DataError:
                raise
            except AddendaError as error:
                found[base] = error
        failed = [one for one in found.values() if isinstance(one, AddendaError)]
        if len(failed) == len(found):
            raise failed[0]
        return found

    def groups(
        self, recipes: Mapping[str, Recipe | AddendaError], together: int | None
    ) -> tuple[list[tuple[Shared, dict[str, Recipe]]], dict[str, AddendaError]]:
        """Return which of the named recipes are trained at once, completed and with what they share.

        Also returned: why others cannot be trained at all.
        """
        by_shared: dict[int, tuple[Shared, dict[str, Recipe]]] = {}
        failed: dict[str, AddendaError] = {}
        for name, recipe in recipes.items():
            try:
                if isinstance(recipe, AddendaError):
                    raise recipe
                shared = self._of(recipe)
                own = by_shared.setdefault(id(shared), (shared, {}))[1]
                own[name] = shared.completed(recipe)
            except AddendaError as error:
                failed[name] = error
        groups = []
        for shared, own in by_shared.values():
            names = list(own)
            for places in shared.groups(list(own.values()), together):
                groups.append((shared, {names[place]: own[names[place]] for place in places}))
        return groups, failed

    def _of(self, recipe: Recipe) -> Shared:
        found = self._open[recipe.base]
        if isinstance(found, AddendaError):
            raise found
        return found

    def keep_only(self, shared: Shared) -> None:
        """Let go of the bases that were loaded for others."""
        for other in self._open.values():
            if isinstance(other, Shared) and other is not shared:
                other.release()


def _begun(recipe: Recipe) -> Recipe | None:
    """The recipe of a trial that was begun with the same base, for its derived values."""
    for path in sorted((Path(recipe.out or "") / TRIALS).glob(f"*/{RECIPE}")):
        before = resolve(file=path)
        if all(
            wanted in (None, "auto", getattr(before.base, key)) for key, wanted in vars(recipe.base).items()
        ):
            return before
    return None


def _plan(wanted: Sweep, search: Search, families: _Families) -> SweepPlan:
    points = {str(place): point for place, point in enumerate(search.samples())}
    recipes = {name: _recipe(wanted, point) for name, point in points.items()}
    groups, failed = families.groups(recipes, wanted.together)
    found = {name: TrialPlan(points[name], None, None, 0, error.message) for name, error in failed.items()}
    for shared, group in groups:
        for name, recipe in group.items():
            foretold = shared.forecast(recipe)
            seconds, size = (foretold.seconds, foretold.ledger.total) if foretold else (None, None)
            found[name] = TrialPlan(points[name], seconds, size, len(group))
    return SweepPlan(wanted.search, search.total, [found[name] for name in points])


def _recipe(wanted: Sweep, point: Point) -> Recipe | AddendaError:
    try:
        return wanted.source.recipe(point)
    except AddendaError as error:
        return error


def _run(
    trials: Sequence[Trial], wanted: Sweep, families: _Families, on_event: OnRunEvent, command: str
) -> Iterator[Outcome]:
    """Run the trials that are still to be run, those first that are known already."""
    wanted_recipes = {trial.name: _recipe_of(wanted, trial) for trial in trials}
    for trial in trials:
        _clear_of_others(trial, wanted_recipes[trial.name], on_event)
    known = {trial.name: read_outcome(trial) for trial in trials}
    yield from (outcome for outcome in known.values() if outcome is not None)
    missing = {trial.name: trial for trial in trials if known[trial.name] is None}
    recipes = {name: wanted_recipes[name] for name in missing}
    groups, failed = families.groups(recipes, wanted.together)
    for name, error in failed.items():
        yield _ended(missing[name], error)
    for shared, group in groups:
        families.keep_only(shared)
        on_event(Note("\n".join(f"{name}: {shown(missing[name].point)}" for name in group)))
        results = run_shared(shared, list(group.values()), on_event, command=command)
        for name, result in zip(group, results, strict=True):
            if isinstance(result, AddendaError):
                yield _ended(missing[name], result)
            else:
                done = Outcome(missing[name], result.heldout, result.figures)
                done.write()
                yield done


def _recipe_of(wanted: Sweep, trial: Trial) -> Recipe | AddendaError:
    """The recipe of a trial, with its own folder and name; it answers questions only where the user asks for that."""
    recipe = _recipe(wanted, trial.point)
    if isinstance(recipe, AddendaError):
        return recipe
    own = recipe.derive("out", str(trial.folder), "of the sweep").derive("name", trial.name, "of the sweep")
    asked = recipe.origin("evals.samples").kind != "default"
    return own if asked else own.derive("evals.samples", 0, "trials are compared by their loss")


def _clear_of_others(trial: Trial, recipe: Recipe | AddendaError, on_event: OnRunEvent) -> None:
    """Empty the folder of a trial that was begun with other settings.

    A search that goes on may choose others than before, once a trial that had failed by then has a loss.
    """
    begun = trial.folder / RECIPE
    if isinstance(recipe, AddendaError) or not begun.is_file():
        return
    before, now = resolve(file=begun).values(), recipe.values()
    if any(now[key] not in (None, "auto", before.get(key)) for key in trial.point):
        on_event(Note(f"{trial.name} was begun with other settings, and is run anew: {shown(trial.point)}"))
        clear(trial.folder)


def _ended(trial: Trial, error: AddendaError) -> Outcome:
    """The outcome of a trial that ended early; what diverged once will do so again."""
    outcome = Outcome(trial, None, {}, error.message, again=not isinstance(error, TrainingError))
    trial.folder.mkdir(parents=True, exist_ok=True)
    outcome.write()
    return outcome


def _write(summary: SweepSummary, wanted: Sweep) -> None:
    write_json(summary.folder / TABLE, summary.document())
    if summary.best is not None:
        recipe = wanted.source.recipe(summary.best.outcome.trial.point)
        write_text(summary.folder / BEST, recipe.derive("out", None, "a run of its own").to_toml())
