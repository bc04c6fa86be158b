"""``addenda sweep``: try settings, and say which are best."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from addenda.cli.console import Console, binary_size, count, duration, table
from addenda.cli.display import Display
from addenda.cli.recipe_flags import recipe_arguments, recipe_flags
from addenda.cli.verb import verb
from addenda.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from addenda.sweeps import Standing, Sweep, SweepPlan, SweepSummary

__all__ = ["command"]


@verb(
    "sweep",
    examples=[
        "addenda sweep rows.jsonl --over train.learning_rate=1e-4,3e-4,1e-3 --over method.rank=4,16",
        "addenda sweep rows.jsonl --over train.learning_rate=1e-5..1e-2:log --search optuna --trials 12",
        "addenda sweep --resume --out runs/rows-sweep",
        "addenda train --recipe runs/rows-sweep/best.toml --out runs/best",
    ],
)
@click.argument("data", required=False)
@click.option(
    "--over",
    multiple=True,
    metavar="KEY=VALUES",
    help="Values of a setting, with commas, or LOW..HIGH or LOW..HIGH:log for a search; repeatable.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "optuna"]),
    help="Every combination, or as Optuna chooses. [default: grid]",
)
@click.option(
    "--trials", type=click.IntRange(min=1), metavar="N", help="How many a search runs. [default: 20]"
)
@click.option(
    "--together",
    metavar="N",
    default="auto",
    help="Trials trained at once; auto: as memory allows. [default: auto]",
)
@click.option("--dry-run", is_flag=True, help="Show the trials and what they would take, and stop.")
@click.option("--out", metavar="FOLDER", help="The sweep's folder. [default: runs/DATA-sweep]")
@click.option("--valid", metavar="FILE", help="Held-out rows; otherwise a tenth of DATA is held out.")
@click.option("--resume", is_flag=True, help="Go on with the sweep in --out.")
@click.option("--force", is_flag=True, help="Replace the sweep in --out.")
@recipe_flags
def command(
    console: Console,
    *,
    data: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    valid: str | None,
    **flags: Any,
) -> None:
    """Train DATA with several settings and order them by their loss on the same held-out rows.

    The settings are those of a recipe, spelled as for --set; a recipe may hold the same in a table [sweep.over]. Each
    trial leaves a run folder in FOLDER/trials; FOLDER/sweep.json has the table and FOLDER/best.toml the best recipe. A
    trial that fails is listed with its reason.
    """
    wanted = _wanted(resume=resume, force=force, data__path=data, data__valid=valid, **flags)
    from addenda.sweeps import plan_sweep, sweep

    with Display(console) as display:
        if dry_run:
            planned = plan_sweep(wanted, display)
            console.result(planned.document(), lambda: _plan_text(planned))
            return
        command_line = shlex.join(["addenda", *sys.argv[1:]])
        summary = sweep(wanted, on_event=display, resume=resume, force=force, command=command_line)
    console.result(summary.document(), lambda: _text(summary))


def _wanted(
    *,
    resume: bool,
    force: bool,
    over: tuple[str, ...],
    search: Any,
    trials: int | None,
    together: str,
    **flags: Any,
) -> Sweep:
    from addenda.sweeps import Source, Sweep, parse_axes, read_sweep_table

    if resume:
        _require_as_begun({"--over": over, "--search": search, "--force": force, **flags})
        flags["file"] = _begun(flags["out"])
    held = {} if flags["file"] is None else read_sweep_table(flags["file"])
    return Sweep(
        Source(recipe_arguments(**flags)),
        parse_axes(over, held.get("over")),
        search=search or held.get("search", "grid"),
        trials=trials or held.get("trials"),
        together=_count(together) or held.get("together"),
    )


_OF_THE_SWEEP = {
    "data__path": "DATA",
    "data__valid": "--valid",
    "file": "--recipe",
    "sets": "--set",
    "base": "--base",
    "method": "--method",
    "targets": "--targets",
}
"""Flags that decide what the trials are, by the keywords they arrive as."""


def _require_as_begun(given: dict[str, Any]) -> None:
    """Refuse what would make later trials of a sweep others than the first ones were."""
    refused = [name for name in ("--over", "--search", "--force") if given[name]]
    refused += [name for keyword, name in _OF_THE_SWEEP.items() if given[keyword]]
    if refused:
        raise ConfigError(
            f"--resume goes on with a sweep as it was begun, and takes no {', '.join(refused)}",
            hint="name its folder by --out alone, or leave out --resume and start another sweep",
        )


def _begun(out: str | None) -> Path:
    """The recipe that the sweep in a folder was begun with."""
    from addenda.sweeps import SWEEP_RECIPE

    if out is None:
        raise ConfigError(
            "--resume needs --out", hint="name the folder of the sweep to go on with: --out runs/NAME"
        )
    file = Path(out) / SWEEP_RECIPE
    if not file.is_file():
        raise NotFoundError(f"there is no sweep to resume in '{out}'", hint="leave out --resume to start one")
    return file


def _count(together: str) -> int | None:
    if together == "auto":
        return None
    if not together.isdecimal() or int(together) < 1:
        raise ConfigError(
            f"--together takes a number or auto, got '{together}'", hint="--together 1 trains one at a time"
        )
    return int(together)


def _plan_text(planned: SweepPlan) -> str:
    keys = list(planned.shown[0].point)
    rows = [
        [
            *(str(one.point[key]) for key in keys),
            one.reason or ("not foretold" if one.seconds is None else duration(one.seconds)),
            "" if one.bytes is None else binary_size(one.bytes),
            one.together,
        ]
        for one in planned.shown
    ]
    headers = [*(key.partition(".")[2] for key in keys), "training", "memory alone", "at once"]
    whole = (
        ""
        if planned.seconds is None
        else f", about {duration(planned.seconds)} of training one after another"
    )
    which = "" if planned.search == "grid" else f"; {planned.search} chooses between these ends"
    return f"{table(rows, headers)}\n\n{count(planned.trials, 'trial')}{whole}{which}"


def _text(summary: SweepSummary) -> str:
    keys = list(summary.standings[0].outcome.trial.point)
    rows = [_row(one, keys) for one in summary.standings]
    headers = [
        "trial",
        *(key.partition(".")[2] for key in keys),
        "held-out nll",
        "95% interval",
        "behind the best",
    ]
    failed = [
        f"{one.outcome.trial.name} ended early: {one.outcome.reason}"
        for one in summary.standings
        if one.nll is None
    ]
    return "\n".join([table(rows, headers), *failed, "", _verdict(summary)])


def _row(one: Standing, keys: list[str]) -> list[object]:
    values = [str(one.outcome.trial.point[key]) for key in keys]
    if one.nll is None:
        return [one.outcome.trial.name, *values, "failed", "", ""]
    behind = "" if one.behind is None else f"{one.behind.value:+.4f} {_ends(one.behind.low, one.behind.high)}"
    return [one.outcome.trial.name, *values, f"{one.nll.value:.4f}", _ends(one.nll.low, one.nll.high), behind]


def _ends(low: float | None, high: float | None) -> str:
    return "too few rows" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _verdict(summary: SweepSummary) -> str:
    best = summary.best
    if best is None:
        return "every trial ended early: there is no best recipe"
    close = [one.outcome.trial.name for one in summary.not_told_apart]
    apart = (
        f"its distance to {', '.join(close)} may be chance"
        if close
        else "every other one is worse by more than chance"
        if len(summary.standings) > 1
        else "it is the only one"
    )
    foretold = (
        ""
        if summary.foretold is None
        else f"; the trainings alone were foretold to take {duration(summary.foretold)} one after another"
    )
    return (
        f"best: {best.outcome.trial.name}; {apart}\n"
        f"recipe: {summary.folder / 'best.toml'}\n"
        f"adapter: {best.outcome.trial.folder / 'adapter'}\n"
        f"time: {duration(summary.seconds)}{foretold}"
    )
