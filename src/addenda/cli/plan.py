"""``addenda plan``: what would be adapted, and what that takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from addenda.cli.console import Console, binary_size, duration
from addenda.cli.display import Display
from addenda.cli.recipe_flags import read_recipe, recipe_flags
from addenda.cli.verb import verb

if TYPE_CHECKING:
    from addenda.recipe import Setup
    from addenda.settings import Recipe

__all__ = ["command"]


@verb(
    "plan",
    examples=[
        "addenda plan",
        "addenda plan rows.jsonl --set train.memory_gib=4",
        "addenda plan --method ia3",
        "addenda plan --targets q_proj,v_proj --set method.rank=4 --json",
    ],
)
@click.argument("data", required=False)
@recipe_flags
def command(console: Console, *, data: str | None, **flags: Any) -> None:
    """Show which layers a method would adapt, and the memory, time and energy that training on DATA would take.

    A few blocks of the base are timed on this machine for some seconds, with noise for weights; the base itself is not
    loaded, nothing is trained or written. Without DATA one step on rows of usual length stands for the run.
    """
    recipe = read_recipe(data__path=data, **flags)
    from addenda.recipe import plan_run

    with Display(console) as display:
        recipe, setup = plan_run(recipe, display)
    console.result(_document(recipe, setup), lambda: _text(setup, steps_known=bool(recipe.data.path)))


def _document(recipe: Recipe, setup: Setup) -> dict[str, Any]:
    planned, calibration = setup.plan, setup.calibration
    document: dict[str, Any] = {
        "base": recipe.base.source,
        "weights": setup.base.weights,
        "weights_reason": setup.reason,
        "dtype": setup.dtype,
        "method": recipe.method.name,
        "settings": recipe.method.settings(),
        "parameters": planned.parameters,
        "bytes": planned.bytes,
        "base_parameters": planned.base_parameters,
        "notes": list(planned.notes),
        "layers": [asdict(row) for row in planned.rows],
        "forecast": setup.forecast and setup.forecast.document(),
    }
    if calibration is not None:
        document |= {
            "path": {"name": calibration.path, "reason": calibration.reason},
            "fused": dict(calibration.fused),
            "not_fused": [{"kind": kind, "reason": why} for kind, why in calibration.unfused],
            "calibration_seconds": calibration.seconds,
        }
    return document


def _text(setup: Setup, *, steps_known: bool) -> str:
    lines = [f"base weights: {setup.base.weights} {setup.dtype}: {setup.reason}", str(setup.plan)]
    calibration, found = setup.calibration, setup.forecast
    if calibration is None or found is None:
        return "\n".join(lines)
    fused = ", ".join(f"{count} {kind}" for kind, count in calibration.fused) or "none"
    lines += [
        f"{calibration.path} path: {calibration.reason}",
        f"fused parts: {fused}" + "".join(f"; {kind} not: {why}" for kind, why in calibration.unfused),
        f"at once: {found.tokens_per_micro_batch:,} tokens"
        + (
            f", {found.recompute} of {found.blocks} blocks run again in the backward"
            if found.recompute
            else ""
        ),
        f"memory to train: about {binary_size(found.ledger.total)} of {binary_size(found.limit)}",
        *(f"  {binary_size(size):>10}  {name}" for name, size in asdict(found.ledger).items()),
        f"speed: about {found.tokens_per_second:,.0f} tokens/s",
    ]
    if steps_known:
        lines.append(
            f"time: about {duration(found.step_seconds)} for {found.steps:,} steps ({found.tokens:,} tokens), "
            f"{duration(found.evaluation_seconds)} for evaluations meanwhile"
        )
        energy = (
            "not told by this machine" if found.joules is None else f"about {found.joules / 3600:,.1f} Wh"
        )
        lines.append(f"energy of the processor: {energy}")
    return "\n".join(lines)
