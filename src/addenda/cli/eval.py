"""``addenda eval``: measure a model on data, with and without an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.recipe_flags import read_recipe, recipe_flags
from addenda.cli.verb import verb
from addenda.errors import ConfigError

if TYPE_CHECKING:
    from addenda.settings import Recipe

__all__ = ["command"]


@verb(
    "eval",
    examples=[
        "addenda eval heldout.jsonl",
        "addenda eval heldout.jsonl --adapter runs/support/adapter",
        "addenda eval heldout.jsonl --adapter runs/support/adapter --json",
    ],
)
@click.argument("data")
@click.option("--adapter", metavar="FOLDER", help="An adapter or run folder; a PEFT folder works too.")
@recipe_flags
def command(console: Console, data: str, adapter: str | None, **flags: Any) -> None:
    """Measure how well a model predicts the answers in DATA, rows that it was not trained on.

    With --adapter: the base and the adapted model on the same rows, and how far the model moved on general prompts.
    """
    recipe = read_recipe(**flags, data__path=data)
    if adapter is not None:
        _require_only_measuring(recipe)
    with Display(console) as display:
        if adapter is None:
            figures = _base_alone(recipe, display)
        else:
            # The adapter names its base unless the user does.
            source = recipe.base.source if recipe.origin("base.source").kind != "default" else None
            figures = _adapted(recipe, adapter, source, display)
    console.result({"data": data, "adapter": adapter, **figures}, lambda: _text(figures))


def _require_only_measuring(recipe: Recipe) -> None:
    """What the adapter decides cannot be set beside it; a recipe file may say it, for it is that of the run."""
    decided = [
        key
        for key, origin in recipe.origins.items()
        if origin.kind in ("flag", "--set") and (key.startswith("method.") or key == "base.template")
    ]
    if decided:
        raise ConfigError(
            f"{decided[0]} is decided by the adapter",
            hint="leave it out, or measure the base without --adapter",
        )


def _base_alone(recipe: Recipe, display: Display) -> dict[str, Any]:
    from addenda.evals.heldout import heldout
    from addenda.recipe import encode_all, number_format, prepare_base, prepare_data

    dataset = prepare_data(recipe.data, display)
    base = prepare_base(recipe.base, number_format(recipe.base).dtype, display)
    rows = encode_all(dataset, base, recipe.data, display)
    measured = heldout(base, rows.examples, task="rows", on_progress=display)
    return {
        "base": base.name,
        "rows": measured.rows,
        "tokens": measured.tokens,
        "nll": measured.nll_per_token,
        "token_accuracy": measured.token_accuracy,
    }


def _adapted(recipe: Recipe, adapter: str, source: str | None, display: Display) -> dict[str, Any]:
    from addenda.evals.suite import evaluate
    from addenda.recipe import encode_all, load_adapted, number_format, prepare_data

    dataset = prepare_data(recipe.data, display)
    dtype, device = number_format(recipe.base).dtype, recipe.base.device
    base, handle, _ = load_adapted(adapter, source=source, dtype=dtype, device=device, on_event=display)
    rows = encode_all(dataset, base, recipe.data, display)
    return {"base": base.name, **evaluate(base, handle, rows.examples, on_progress=display).figures()}


def _text(figures: dict[str, Any]) -> str:
    if "nll" in figures:
        return (
            f"{figures['base']}: nll {figures['nll']:.4f} nats per token, {figures['token_accuracy']:.1%} of tokens "
            f"right, on {figures['rows']:,} rows, {figures['tokens']:,} tokens"
        )
    change = figures["heldout_nll_change_interval"]
    ends = f", 95% interval {change[0]:+.4f} to {change[1]:+.4f}" if change else ""
    before, after = figures["heldout_token_accuracy_before"], figures["heldout_token_accuracy_after"]
    return "\n".join(
        [
            f"{'nll':<20} {figures['heldout_nll_before']:.4f} -> {figures['heldout_nll_after']:.4f} nats per token "
            f"(change {figures['heldout_nll_change']:+.4f}{ends})",
            f"{'tokens right':<20} {before:.1%} -> {after:.1%}",
            f"{'rows':<20} {figures['heldout_rows']:,} ({figures['heldout_tokens']:,} tokens)",
            f"{'moved from the base':<20} {figures['base_kl_general']:.4f} nats per token on general prompts (mean KL)",
        ]
    )
