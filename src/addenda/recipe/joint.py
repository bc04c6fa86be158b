"""Recipes that train on the same rows and base: read and loaded once, and trained several at a time where it works."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from addenda.bases import LoadedBase
from addenda.core import Progress, activate, activated, handles
from addenda.core.sequence import SequenceMethod
from addenda.errors import AddendaError, TrainingError
from addenda.recipe.folder import (
    RECIPE,
    RunSummary,
    begin_folder,
    clear,
    finish_folder,
    identity_of,
    logged_events,
    run_prepared,
)
from addenda.recipe.planner import Setup, choose_setup, plan_of, row_sizes
from addenda.recipe.prepare import (
    Note,
    OnRunEvent,
    Prepared,
    RunRows,
    attach_run,
    prepare_base,
    read_rows,
    settle,
    with_tokens,
)
from addenda.settings import Recipe, resolve
from addenda.train import Event, OnEvent, Precision, StartEvent, StepEvent, lock_run
from addenda.train.forecast import Forecast, RowSize, Workload, forecast
from addenda.train.offload import require_offloadable
from addenda.train.parallel import Parallel
from addenda.train.together import PROCESS_SETTINGS, Job, train_together

__all__ = ["MOST_TOGETHER", "Shared", "open_shared", "run_shared"]

MOST_TOGETHER = 4
"""Trained at once where nothing is asked for; more were not seen to be faster."""

_SETTLED = ("base.device", "base.dtype", "base.weights", "data.max_tokens", "train.tokens_per_micro_batch")
"""What follows from the base, the machine and the rows, and has to be one for all."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """Rows, a base that is loaded when first needed, and what recipes on them will take."""

    settled: Recipe
    """One of the recipes, with everything that was derived."""
    rows: RunRows
    precision: Precision
    setups: Mapping[str, Setup]
    """By what decides the cost of a step."""
    on_event: OnRunEvent

    @functools.cached_property
    def base(self) -> LoadedBase:
        """The base with its weights."""
        return prepare_base(self.settled.base, self.precision.dtype, self.on_event)

    def release(self) -> None:
        """Let go of the base's weights; they are loaded again when needed."""
        self.__dict__.pop("base", None)

    def completed(self, recipe: Recipe) -> Recipe:
        """Return a recipe with what was derived for all, where it leaves that open.

        Raises:
            ConfigError: it does not fit the machine.
        """
        values, open_ = self.settled.values(), recipe.values()
        for key in _SETTLED:
            if open_[key] in (None, "auto") and values[key] not in (None, "auto"):
                recipe = recipe.derive(key, values[key], self.settled.origin(key).note or "as the others")
        require_offloadable(recipe.train, torch.device(self.settled.base.device))
        return with_tokens(recipe, self.rows.base)

    def forecast(self, recipe: Recipe) -> Forecast | None:
        """Foretell a run; None where that cannot be done, or where it does not fit."""
        setup = self.setups.get(_cost_key(recipe))
        if setup is None or setup.calibration is None or setup.memory is None or setup.forecast is None:
            return None
        workload = Workload(recipe.train, *self._sizes)
        return forecast(setup.calibration, setup.memory, setup.forecast.limit, workload)

    @functools.cached_property
    def _sizes(self) -> tuple[list[RowSize], list[RowSize]]:
        return row_sizes(self.rows.train), row_sizes(self.rows.heldout)

    def groups(self, recipes: Sequence[Recipe], together: int | None) -> list[list[int]]:
        """Return which recipes are trained at once, by their places: in order, as many as memory holds.

        Args:
            recipes: completed.
            together: the most at once; None: `MOST_TOGETHER`.
        """
        found: list[list[int]] = []
        open_groups: dict[str, list[int]] = {}
        for place, recipe in enumerate(recipes):
            key = _engine_key(recipe) if _can_share(recipe) else f"alone {place}"
            group = open_groups.get(key)
            if group is None or len(group) >= min(together or MOST_TOGETHER, self._most(recipe)):
                group = open_groups[key] = []
                found.append(group)
            group.append(place)
        return found

    def _most(self, recipe: Recipe) -> int:
        """How many like this one fit into memory at once, at least one."""
        setup = self.setups.get(_cost_key(recipe))
        if setup is None or setup.forecast is None or setup.memory is None:
            return 1
        left = setup.forecast.limit - setup.forecast.ledger.total
        return 1 + max(0, left) // max(1, setup.memory.trained + setup.plan.bytes)


def _can_share(recipe: Recipe) -> bool:
    """Whether rows of one pass can each have an adapter of this recipe's method."""
    method = recipe.method
    refused = isinstance(method, SequenceMethod) or "rows" in method.exceptions or method.needs() is not None
    return not refused and recipe.train.sharding == "none"


def _engine_key(recipe: Recipe) -> str:
    """The settings of the process that a recipe sets; what it leaves open is derived, and the same in all."""
    values = {name: getattr(recipe.train, name) for name in PROCESS_SETTINGS}
    return repr(
        [
            (name, value)
            for name, value in values.items()
            if value is not None and recipe.origin(f"train.{name}").kind != "derived"
        ]
    )


def _cost_key(recipe: Recipe) -> str:
    """What decides the cost of a step, but for how large the adapter is: it is timed with the largest."""
    own = (recipe.method.name, recipe.targets, recipe.train.optimizer, recipe.train.through)
    return repr((*own, _engine_key(recipe)))


def open_shared(recipes: Sequence[Recipe], on_event: OnRunEvent, *, begun: Recipe | None = None) -> Shared:
    """Read the rows, time the methods, and settle how the base is held; its weights are not loaded.

    Args:
        recipes: at least one; sections base and data are the same in all.
        on_event: told of progress and notes.
        begun: one that was run with others of these before, whose derived values are kept.

    Raises:
        DataError: the data has errors, or no row can be held out.
        ConfigError: settings that do not fit the base or the data.
        AddendaError: none of them can be run; the error of the first.
    """
    widest = max(recipes, key=lambda recipe: recipe.method.positions)
    before = {} if begun is None else begun.values()
    for key in _SETTLED if begun else ():
        if before[key] is not None and widest.values()[key] in (None, "auto"):
            widest = widest.derive(key, before[key], "as the runs before")
    settled, rows = read_rows(widest, on_event, Parallel())
    sizes = row_sizes(rows.train), row_sizes(rows.heldout)
    setups: dict[str, Setup] = {}
    failed: list[AddendaError] = []
    for recipe in _largest(recipes, settled, rows, failed):
        try:
            setups[_cost_key(recipe)] = choose_setup(recipe, rows.base, *sizes, on_progress=on_event)
        except AddendaError as error:
            failed.append(error)
    if not setups:
        raise failed[0]
    lead = max(setups.values(), key=lambda setup: setup.forecast.ledger.total if setup.forecast else 0)
    on_event(Note(str(lead)))
    settled, precision = settle(settled, rows.precision, lead.document())
    return Shared(settled, rows, precision, setups, on_event)


def _largest(
    recipes: Sequence[Recipe], settled: Recipe, rows: RunRows, failed: list[AddendaError]
) -> Iterator[Recipe]:
    """Of the recipes whose steps cost alike, the one with the largest adapter; notes why others have no plan."""
    sizes: dict[str, tuple[int, Recipe]] = {}
    for recipe in recipes:
        try:
            one = with_tokens(dataclasses.replace(recipe, base=settled.base), rows.base)
            size = plan_of(one, rows.base).parameters
        except AddendaError as error:
            failed.append(error)
            continue
        if size > sizes.get(_cost_key(one), (-1, one))[0]:
            sizes[_cost_key(one)] = (size, one)
    for _, one in sizes.values():
        yield one


def run_shared(
    shared: Shared, recipes: Sequence[Recipe], on_event: OnRunEvent, *, command: str = ""
) -> list[RunSummary | AddendaError]:
    """Train recipes at once, each in its own folder, where it goes on with what it began.

    What cannot be trained together after all is trained one after another.

    Args:
        shared: what they share.
        recipes: completed, each with a folder and a name of its own.
        on_event: told of progress and notes.
        command: the command line, for the reports.

    Returns:
        For each what it left behind, or why it ended.
    """
    tell = _progress_alone(on_event)
    if len(recipes) > 1:
        try:
            return _together(shared, list(map(_as_begun, recipes)), tell, command)
        except AddendaError as error:
            on_event(Note(f"not trained together, {error.message}; one after another"))
            for recipe in recipes:
                clear(Path(recipe.out or ""))
    return [_alone(shared, _as_begun(recipe), tell, command) for recipe in recipes]


def _progress_alone(on_event: OnRunEvent) -> OnRunEvent:
    """Of what single runs tell, only how far they have come: the rest is in their folders."""

    def tell(event: Event | Progress | Note) -> None:
        if isinstance(event, Progress | StepEvent):
            on_event(event)

    return tell


def _as_begun(recipe: Recipe) -> Recipe:
    """The recipe that the run in its folder began with, if one did."""
    if not _began(recipe):
        return recipe
    return resolve(file=Path(recipe.out or "") / RECIPE, flags={"out": recipe.out})


def _alone(shared: Shared, recipe: Recipe, on_event: OnRunEvent, command: str) -> RunSummary | AddendaError:
    started = time.monotonic()
    with lock_run(recipe.out or ""), _detached(shared.base):
        try:
            ready = _ready(shared, recipe, on_event)
            return run_prepared(ready, on_event, started=started, resume=_began(recipe), command=command)
        except AddendaError as error:
            return error


def _together(
    shared: Shared, recipes: Sequence[Recipe], on_event: OnRunEvent, command: str
) -> list[RunSummary | AddendaError]:
    started = time.monotonic()
    with contextlib.ExitStack() as held:
        for recipe in recipes:
            held.enter_context(lock_run(recipe.out or ""))
        held.enter_context(_detached(shared.base))
        resumed = [_began(recipe) for recipe in recipes]
        readies = [_ready(shared, recipe, on_event) for recipe in recipes]
        for ready, resume in zip(readies, resumed, strict=True):
            if not resume:
                begin_folder(ready, Path(ready.recipe.out or ""))
        steps = _Steps(on_event)
        jobs = [_job(ready, steps.of(place), resume=resumed[place]) for place, ready in enumerate(readies)]
        shared.rows.dataset.verify()
        results = train_together(shared.base, jobs)
        steps.over()
        found: list[RunSummary | AddendaError] = []
        for ready, result in zip(readies, results, strict=True):
            if isinstance(result, TrainingError):
                found.append(result)
                continue
            with activated(shared.base.model, ready.handle.name):
                try:
                    summary = finish_folder(
                        ready, result, on_event, started=started, command=command, together=len(jobs)
                    )
                    found.append(summary)
                except AddendaError as error:
                    found.append(error)
        return found


def _began(recipe: Recipe) -> bool:
    return (Path(recipe.out or "") / RECIPE).is_file()


def _ready(shared: Shared, recipe: Recipe, on_event: OnRunEvent) -> Prepared:
    """Attach one more adapter, which acts alone."""
    if handles(shared.base.model):
        activate(shared.base.model, None)
    foretold = shared.forecast(recipe)
    return attach_run(
        recipe,
        shared.rows,
        shared.base,
        on_event,
        Parallel(),
        precision=shared.precision,
        forecast=None if foretold is None else foretold.document(),
        resume=Path(recipe.out or "") if _began(recipe) else None,
    )


@contextlib.contextmanager
def _detached(base: LoadedBase) -> Iterator[None]:
    """Leave the base bare."""
    try:
        yield
    finally:
        for handle in list(handles(base.model).values()):
            handle.detach()


def _job(ready: Prepared, on_event: OnEvent, *, resume: bool) -> Job:
    folder = Path(ready.recipe.out or "")
    return Job(
        ready.handle,
        ready.train.examples,
        ready.recipe.train,
        folder,
        logged_events(folder, on_event),
        ready.heldout.examples,
        identity=identity_of(ready),
        resume=resume,
    )


class _Steps:
    """The steps of several runs as the progress of one; their other events go to their metrics alone."""

    def __init__(self, on_event: OnRunEvent) -> None:
        self._on_event = on_event
        self._done: dict[int, int] = {}
        self._total: dict[int, int] = {}

    def of(self, place: int) -> OnEvent:
        """Return what is told of the events of one run."""

        def tell(event: Event) -> None:
            if isinstance(event, StartEvent | StepEvent):
                self._total[place] = event.of_steps
            if isinstance(event, StepEvent):
                self._done[place] = event.step
                self._show(sum(self._done.values()))

        return tell

    def over(self) -> None:
        """Say that all steps are done, also those that a run that stopped early had no need of."""
        self._show(sum(self._total.values()))

    def _show(self, done: int) -> None:
        self._on_event(Progress("train", done, sum(self._total.values()), "steps"))
