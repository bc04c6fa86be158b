"""``addenda train``: adapt a model to data, and show what that did."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from addenda.cli.columns import before_and_after
from addenda.cli.console import Console, binary_size, duration
from addenda.cli.display import Display
from addenda.cli.recipe_flags import read_recipe, recipe_flags
from addenda.cli.verb import verb
from addenda.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from addenda.evals.record import SeedFacts
    from addenda.recipe import RunSummary
    from addenda.settings import Recipe

__all__ = ["command"]


@verb(
    "train",
    examples=[
        "addenda train rows.jsonl",
        "addenda train rows.jsonl --method ia3 --out runs/try --set train.epochs=5",
        "addenda train rows.jsonl --base ./my-model --set method.rank=8 --dry-run",
        "addenda train --recipe runs/try/recipe.resolved.toml --out runs/again",
        "addenda train --resume --out runs/try",
    ],
)
@click.argument("data", required=False)
@click.option("--out", metavar="FOLDER", help="The run folder. [default: runs/DATA-METHOD]")
@click.option("--name", metavar="NAME", help="The adapter's name.")
@click.option("--valid", metavar="FILE", help="Held-out rows; otherwise a tenth of DATA is held out.")
@click.option("--seed", type=int, metavar="N", help="Seed of split, order, initial values and dropout.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in --out.")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe with each value's origin, and stop.")
@click.option(
    "--profile",
    is_flag=True,
    help="Show where the time of a step goes, measured on two steps; takes more memory.",
)
@recipe_flags
def command(
    console: Console,
    *,
    data: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    profile: bool,
    **flags: Any,
) -> None:
    """Adapt a model to DATA: a file, a folder with train and valid files, or - for standard input.

    Writes a run folder: recipe.resolved.toml, environment.json, metrics.jsonl, adapter/, summary.json, report.html,
    record.json, all that the report says as data, and start/, the adapter as it began, where that had to be computed.
    Ctrl-C saves a checkpoint; --resume goes on from it. Settings of sections base, data, method, train and evals are
    set in a recipe or with --set; --dry-run shows them all.
    """
    recipe = _recipe(data, resume=resume, force=force, flags=flags)
    from addenda.recipe import with_folder
    from addenda.train.parallel import processes

    with processes() as parallel:
        recipe = with_folder(recipe)
        if not dry_run:
            summary = _run(recipe, console, resume=resume, force=force, profile=profile)
            if summary is not None:
                if profile and summary.profile is None:
                    console.note("no profile: the run had fewer than four steps")
                console.result(_document(summary), lambda: _text(console, summary))
        elif parallel.first:
            console.result(recipe.document(), recipe.to_toml().rstrip("\n"))


def _run(recipe: Recipe, console: Console, *, resume: bool, force: bool, profile: bool) -> RunSummary | None:
    from addenda.recipe import run

    command_line = shlex.join(["addenda", *sys.argv[1:]])
    with Display(console) as display:
        try:
            return run(
                recipe, on_event=display, resume=resume, force=force, command=command_line, profile=profile
            )
        except KeyboardInterrupt as stopped:
            if (Path(recipe.out or "") / "recipe.resolved.toml").is_file():
                stopped.add_note(f"go on with: addenda train --resume --out {shlex.quote(recipe.out or '')}")
            raise


def _recipe(data: str | None, *, resume: bool, force: bool, flags: dict[str, Any]) -> Recipe:
    file, out = flags.pop("file"), flags["out"]
    if resume and force:
        raise ConfigError(
            "--resume and --force exclude each other",
            hint="--resume goes on with the run, --force replaces it",
        )
    if resume:
        if out is None:
            raise ConfigError(
                "--resume needs --out", hint="name the run folder to go on with: --out runs/NAME"
            )
        file = file or Path(out) / "recipe.resolved.toml"
        if not file.is_file():
            raise NotFoundError(
                f"there is no run to resume in '{out}'", hint="leave out --resume to start one"
            )
    renamed = {"data__valid": flags.pop("valid"), "train__seed": flags.pop("seed")}
    return read_recipe(file=file, data__path=data, **renamed, **flags)


def _document(summary: RunSummary) -> dict[str, object]:
    profile = {} if summary.profile is None else {"profile": summary.profile.document()}
    report = str(summary.folder / "report.html")
    return {"folder": str(summary.folder), "report": report, **summary.figures, **profile}


def _text(console: Console, summary: RunSummary) -> str:
    parts = [before_and_after(console, pair) for pair in summary.record.samples[:3]]
    profile = [] if summary.profile is None else [str(summary.profile)]
    return "\n\n".join([*parts, *profile, _figures(summary)])


def _figures(summary: RunSummary) -> str:
    figures, record = summary.figures, summary.record
    share = figures["trainable_parameters"] / figures["total_parameters"]
    nll = f"{figures['heldout_nll_before']:.3f} -> {figures['heldout_nll_after']:.3f} nats per token"
    before, after = figures["heldout_token_accuracy_before"], figures["heldout_token_accuracy_after"]
    interval = figures["base_kl_general_interval"]
    ends = f", 95% interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    rows = {
        "verdict": f"{record.learning.verdict}: {record.learning.sentence}",
        "held-out nll": f"{nll} on {figures['heldout_rows']} rows",
        "held-out accuracy": f"{before:.1%} -> {after:.1%} of tokens right",
        "moved from the base": f"{figures['base_kl_general']:.3f} nats per token on general prompts (mean KL{ends})",
        "trained": f"{figures['trainable_parameters']:,} of {figures['total_parameters']:,} parameters ({share:.2%})",
        "speed": f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['trained_tokens']:,} trained tokens"
        + (f", {figures['processes']} processes" if figures["processes"] > 1 else ""),
        "cost": f"{duration(figures['wall_seconds'])}, peak memory {binary_size(figures['peak_rss_bytes'])}",
        "adapter": str(summary.folder / "adapter"),
        "report": str(summary.folder / "report.html"),
    }
    rows |= _over_seeds(record.seeds) if record.seeds else {}
    return "\n".join(f"{name:<20} {value}" for name, value in rows.items())


def _over_seeds(facts: SeedFacts) -> dict[str, str]:
    """How far the figures lie apart; those above are the first seed's."""
    seeds = ", ".join(map(str, facts.seeds))
    found = {f"with seeds {seeds}": "mean, and Student's 95% interval over the seeds"}
    for figure in facts.figures:
        mean = figure.mean
        ends = "one seed alone" if mean.low is None else f"[{mean.low:.4f}, {mean.high:.4f}]"
        found[f"  {figure.key.removesuffix('_after')}"] = f"{mean.value:.4f} {ends}"
    return found | {f"  seed {seed} ended": reason for seed, reason in facts.failed.items()}
