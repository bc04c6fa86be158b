"""One run: read, check, load, attach, train, measure, save, report."""

from __future__ import annotations

import time
from pathlib import Path

from addenda.errors import ConfigError
from addenda.recipe.folder import RunSummary, clear, require_place, run_prepared, train_prepared
from addenda.recipe.prepare import OnRunEvent, prepare
from addenda.recipe.seeds import run_seeds
from addenda.settings import Recipe
from addenda.train import lock_run
from addenda.train.parallel import Parallel, processes

__all__ = ["free_folder", "run", "with_folder"]


def run(
    recipe: Recipe,
    *,
    on_event: OnRunEvent,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    profile: bool = False,
) -> RunSummary | None:
    """Run a recipe: read, check, load, attach, train, measure, save, report.

    Started by torchrun in several processes, all train together; the first one does everything else.

    Args:
        recipe: from `addenda.settings.resolve`.
        on_event: told of progress, notes, and every step.
        resume: go on with the run in ``recipe.out``.
        force: replace the run in ``recipe.out``.
        command: the command line, for the report.
        profile: measure where the time of a few steps goes; they take somewhat longer.

    Returns:
        What the run left behind; None in the processes beside the first.

    Raises:
        DataError: the data has errors; nothing was loaded or trained.
        BusyError: the run folder is not empty, or another process works in it.
        ConfigError: settings that do not fit the base or the data.
        TrainingError: training could not go on.
    """
    with processes() as parallel:
        recipe = with_folder(recipe)
        _require_readable_by_all(recipe, parallel)
        _require_one_seed(recipe, parallel, profile=profile)
        if recipe.train.seeds > 1:
            return run_seeds(recipe, on_event, resume=resume, force=force, command=command)
        if parallel.first:
            return _run(
                recipe, parallel, on_event, resume=resume, force=force, command=command, profile=profile
            )
        ready = prepare(recipe, _silent, parallel)
        train_prepared(ready, Path(recipe.out or ""), _silent, resume=resume)
        return None


def _run(
    recipe: Recipe,
    parallel: Parallel,
    on_event: OnRunEvent,
    *,
    resume: bool,
    force: bool,
    command: str,
    profile: bool,
) -> RunSummary:
    started = time.monotonic()
    folder = Path(recipe.out or "")
    require_place(folder, resume=resume, force=force)
    with lock_run(folder):
        require_place(folder, resume=resume, force=force)
        ready = prepare(recipe, on_event, parallel, resume=folder if resume else None)
        if force and not resume:
            # Only now: a run that cannot start leaves the one before as it was.
            clear(folder)
        return run_prepared(
            ready,
            on_event,
            started=started,
            resume=resume,
            command=command,
            profile=profile,
            processes=parallel.size,
        )


def with_folder(recipe: Recipe) -> Recipe:
    """Choose the run folder where none is named: runs/<data>-<method>, with a number if that is taken.

    Processes that train together take the one that the first finds free.
    """
    if recipe.out is not None:
        return recipe
    free = free_folder(recipe.data.path, recipe.method.name)
    with processes() as parallel:
        return recipe.derive("out", parallel.agree(str(free)), "data and method, the first free name")


def _require_readable_by_all(recipe: Recipe, parallel: Parallel) -> None:
    if recipe.data.path == "-" and not parallel.alone:
        raise ConfigError(
            f"standard input cannot be read by {parallel.size} processes", hint="write the rows to a file"
        )


def _require_one_seed(recipe: Recipe, parallel: Parallel, *, profile: bool) -> None:
    what = "a profile" if profile else "" if parallel.alone else f"training in {parallel.size} processes"
    if recipe.train.seeds > 1 and what:
        raise ConfigError(
            f"{what} is of one seed, and train.seeds is {recipe.train.seeds}", hint="set train.seeds=1"
        )


def _silent(_: object) -> None:
    """What the processes beside the first tell: nothing."""


def free_folder(data: str, what: str) -> Path:
    """Return runs/<data>-<what>, with a number if that is taken."""
    stem = Path(data).stem if data != "-" else "stdin"
    name = f"{stem or 'run'}-{what}"
    taken = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in taken if not path.exists() or _never_began(path))


def _never_began(folder: Path) -> bool:
    """Whether all it holds is the lock of a run that could not start, on faulty data for one."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]
