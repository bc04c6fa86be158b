"""From rows and a base to everything a run needs before its first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from addenda.bases import LoadedBase
from addenda.bases.packed import PackedModel
from addenda.core import Handle, Method, Observed, Plan, Progress, load
from addenda.core.attaching import attach_paths
from addenda.data import Dataset, Encoded, Encoder, Rows, Split, encode_rows, read_dataset, split
from addenda.errors import ConfigError, DataError
from addenda.evals.suite import BaseScores
from addenda.export.format import require_formats
from addenda.recipe.bases import load_causal
from addenda.recipe.observing import observe_base, settle_method
from addenda.recipe.planner import Setup, choose_setup, plan_of, row_sizes
from addenda.settings import BaseSettings, DataSettings, Recipe
from addenda.templates import tokens_of
from addenda.train import Device, Event, Precision, choose_device, choose_precision
from addenda.train.forecast import token_budgets
from addenda.train.offload import require_offloadable
from addenda.train.parallel import Parallel

__all__ = [
    "START",
    "Note",
    "OnRunEvent",
    "Prepared",
    "RunRows",
    "attach_run",
    "encode_all",
    "encoder_for",
    "number_format",
    "plan_run",
    "prepare",
    "prepare_base",
    "prepare_data",
    "read_rows",
    "settle",
    "with_tokens",
]

PROBE_TOKENS = 32
"""Of each row that proves an adapter; whole rows would take more memory than training on them."""

START = "start"
"""Folder in that of a run: the adapter as it began, where that takes a while to find out."""

LONGEST_ROW = 2048
"""Tokens of the longest row where neither the recipe nor the base says less."""


@dataclass(frozen=True)
class Note:
    """Something worth knowing that is no measurement: what was detected, chosen, or left out."""

    text: str


OnRunEvent = Callable[[Event | Progress | Note], None]
"""Told of everything a run does; must return quickly, and what it raises ends the run."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first step."""

    recipe: Recipe
    dataset: Dataset
    split: Split
    base: LoadedBase
    precision: Precision
    plan: Plan
    handle: Handle
    train: Encoded
    heldout: Encoded
    forecast: dict[str, Any] | None
    """What the run will take, as `addenda.train.forecast.Forecast` documents it; None where it cannot be foretold."""
    base_scores: BaseScores
    """Of the rows; see `RunRows`."""


def prepare(
    recipe: Recipe, on_event: OnRunEvent, parallel: Parallel, *, resume: Path | None = None
) -> Prepared:
    """Read, check, split, load, encode, plan and attach; what the recipe left open is derived and noted.

    Args:
        recipe: all settings.
        on_event: told of progress and notes.
        parallel: the processes that train together; the first one finds out what all go by.
        resume: the folder of a run that goes on, whose adapter begins as it began then.

    Raises:
        DataError: the data has errors, or no row can be held out.
        ConfigError: settings that do not fit the base or the data.
        TargetError: a target matches nothing, or an adapter that the probe did not reach.
    """
    recipe, rows = read_rows(recipe, on_event, parallel)
    recipe, precision, foretold = _settle(recipe, rows, on_event, parallel)
    base = prepare_base(recipe.base, precision.dtype, on_event)
    return attach_run(
        recipe, rows, base, on_event, parallel, precision=precision, forecast=foretold, resume=resume
    )


def attach_run(
    recipe: Recipe,
    rows: RunRows,
    base: LoadedBase,
    on_event: OnRunEvent,
    parallel: Parallel,
    *,
    precision: Precision,
    forecast: dict[str, Any] | None,
    resume: Path | None = None,
) -> Prepared:
    """Plan and attach on a base that is loaded, after observing it where the method begins with that.

    Args:
        recipe: all settings, those derived from rows and base included.
        rows: what to train on.
        base: with its weights; other adapters may be on it and do not act meanwhile.
        on_event: told of progress and notes.
        parallel: the processes that train together.
        precision: the base's.
        forecast: what the run will take.
        resume: the folder of a run that goes on.

    Raises:
        MethodError: the method cannot stand on one of the layers.
        TargetError: a target matches nothing, or an adapter that the probe did not reach.
    """
    begun = resume is not None and (resume / START).is_dir()
    from_elsewhere = bool(recipe.method.needs()) and (begun or not parallel.first)
    observed = None if from_elsewhere else observe_base(base, recipe, rows.train, on_event)
    recipe = settle_method(recipe, observed, parallel)
    planned = plan_of(recipe, base)
    on_event(Note(str(planned)))
    if from_elsewhere and resume is not None and begun:
        handle = load(base.model, resume / START, trainable=True)
    else:
        handle = _attach(base, recipe, planned, rows.train, observed, empty=from_elsewhere, on_event=on_event)
    return Prepared(
        recipe,
        rows.dataset,
        rows.split,
        base,
        precision,
        planned,
        handle,
        rows.train,
        rows.heldout,
        forecast,
        rows.base_scores,
    )


def plan_run(recipe: Recipe, on_event: OnRunEvent) -> tuple[Recipe, Setup]:
    """Work out what a run would take, without loading weights; a recipe without data takes one step on usual rows.

    Returns:
        The recipe with what was derived on the way, and the setup with its forecast.

    Raises:
        OutOfMemory: it does not fit.
        DataError: the data has errors.
        TargetError: a target matches nothing.
    """
    _refuse_mixture(recipe)
    if recipe.data.path:
        recipe, rows = read_rows(recipe, on_event, Parallel())
        return recipe, choose_setup(
            recipe, rows.base, row_sizes(rows.train), row_sizes(rows.heldout), on_progress=on_event
        )
    base = load_causal(recipe.base, number_format(recipe.base).dtype, on_progress=on_event, weightless=True)
    recipe = with_tokens(recipe, base)
    _require_exports(recipe, base)
    return recipe, choose_setup(recipe, base, on_progress=on_event)


def _refuse_mixture(recipe: Recipe) -> None:
    """Refuse a method that mixes adapters: a recipe has no way to say which are loaded first."""
    if type(recipe.method).mixes is not Method.mixes:
        raise ConfigError(
            f"method '{recipe.method.name}' mixes other adapters, which a recipe cannot load",
            hint="load them and attach the mixture in Python: docs/guides/several-adapters.md shows it",
        )


def _require_exports(recipe: Recipe, base: LoadedBase) -> None:
    """Refuse what a format that the recipe names cannot carry.

    Raises:
        ConfigError: all that stands against it, and the formats that can.
    """
    if recipe.train.export_to:
        require_formats(recipe.train.export_to, plan_of(recipe, base), base.model, base)


@dataclass(frozen=True)
class RunRows:
    """What there is before the weights are."""

    dataset: Dataset
    split: Split
    train: Encoded
    heldout: Encoded
    base: LoadedBase
    """Without its dense weights."""
    precision: Precision
    base_scores: BaseScores = field(default_factory=dict)
    """What the base makes of them, as far as a run has measured it: the same for all runs on these rows."""


def read_rows(recipe: Recipe, on_event: OnRunEvent, parallel: Parallel) -> tuple[Recipe, RunRows]:
    """Read, check, split and encode; of the base only what encodes is used.

    Returns:
        The recipe with what follows from the base and the machine, and the rows.

    Raises:
        DataError: the data has errors, or no row can be held out.
    """
    _refuse_mixture(recipe)
    dataset = prepare_data(recipe.data, on_event)
    parts = split(
        dataset,
        fraction=recipe.data.heldout_fraction,
        minimum=recipe.data.heldout_minimum,
        seed=recipe.train.seed if recipe.data.heldout_seed is None else recipe.data.heldout_seed,
    )
    on_event(Note(f"split: {parts.note}"))
    if not len(parts.heldout):
        raise DataError(f"no row of {len(dataset)} can be held out", hint="give at least two different rows")
    device = _device_for(recipe, parallel)
    on_event(Note(f"device: {device.device}, {device.reason}"))
    require_offloadable(recipe.train, device.device)
    if recipe.base.device == "auto":
        recipe = recipe.derive("base.device", str(device.device), device.reason)
    precision = _same_precision(number_format(recipe.base), parallel)
    base = load_causal(recipe.base, precision.dtype, on_progress=on_event, weightless=True)
    recipe = with_tokens(recipe, base)
    _require_exports(recipe, base)
    encoder = encoder_for(base, recipe.data, ahead=recipe.method.positions)
    if recipe.data.max_tokens is None:
        taken = f", {recipe.method.positions} of them the method's" if recipe.method.positions else ""
        reason = (
            f"the base's context is {base.context_length:,} tokens{taken}, and {LONGEST_ROW:,} are enough"
        )
        recipe = recipe.derive("data.max_tokens", encoder.max_tokens, reason)
    train_rows = _encode(parts.train, encoder, "training", on_event)
    heldout_rows = _encode(parts.heldout, encoder, "held-out", on_event)
    return recipe, RunRows(dataset, parts, train_rows, heldout_rows, base, precision)


def with_tokens(recipe: Recipe, base: LoadedBase) -> Recipe:
    """Give the method the tokens of the texts that its settings hold."""
    before = recipe.method.settings()
    method = recipe.method.with_tokens(lambda text: tokens_of(base.tokenizer).encode([text])[0].ids)
    for key in before:
        if (value := getattr(method, key)) != getattr(recipe.method, key):
            recipe = recipe.derive(f"method.{key}", value, "tokens of method.text")
    return recipe


def _settle(
    recipe: Recipe, rows: RunRows, on_event: OnRunEvent, parallel: Parallel
) -> tuple[Recipe, Precision, dict[str, Any] | None]:
    """Derive how the base is held and how much runs at once, where the recipe leaves it open.

    The first process decides for all.
    """
    found: dict[str, Any] = {}
    if parallel.first:
        setup = choose_setup(
            recipe,
            rows.base,
            row_sizes(rows.train),
            row_sizes(rows.heldout),
            on_progress=on_event,
            parallel=parallel,
        )
        on_event(Note(str(setup)))
        found = setup.document()
    found = parallel.agree(found)
    recipe, precision = settle(recipe, rows.precision, found)
    on_event(Note(f"precision: {precision.name}, {precision.reason}"))
    return recipe, precision, found["forecast"]


def settle(recipe: Recipe, precision: Precision, found: Mapping[str, Any]) -> tuple[Recipe, Precision]:
    """Derive how the base is held and how much runs at once from a setup's document, where that is open."""
    if found["dtype"] != precision.name:
        precision = Precision(getattr(torch, found["dtype"]), found["reason"])
    if recipe.base.dtype is None:
        recipe = recipe.derive("base.dtype", precision.name, precision.reason)
    if recipe.base.weights == "auto":
        recipe = recipe.derive("base.weights", found["weights"], found["reason"])
    size = found["forecast"] and found["forecast"]["tokens_per_micro_batch"]
    if (
        size
        and recipe.train.tokens_per_micro_batch is None
        and size != token_budgets(on_gpu=recipe.base.device.startswith("cuda"))[0]
    ):
        recipe = recipe.derive("train.tokens_per_micro_batch", size, "soonest over in the memory there is")
    return recipe, precision


def _device_for(recipe: Recipe, parallel: Parallel) -> Device:
    if not parallel.alone and ":" in recipe.base.device:
        raise ConfigError(
            f"base.device = {recipe.base.device} names one GPU for {parallel.size} processes",
            hint="set base.device=cuda: each process of a machine then takes its own",
        )
    return choose_device(recipe.base.device)


def number_format(settings: BaseSettings) -> Precision:
    """The number format of the base: the one that was asked for, or what its device multiplies fastest."""
    return choose_precision(settings.dtype or "auto", device=choose_device(settings.device).device)


def _same_precision(chosen: Precision, parallel: Parallel) -> Precision:
    """What the first process chose: another may have timed the two formats differently."""
    name, reason = parallel.agree([chosen.name, chosen.reason])
    return Precision(getattr(torch, name), reason)


def prepare_data(settings: DataSettings, on_event: OnRunEvent) -> Dataset:
    """Read and check the data; say what was detected and what was noticed.

    Raises:
        DataError: it has errors.
    """
    if not settings.path:
        raise ConfigError("no data was named", hint="addenda train DATA, or data.path in the recipe")
    columns = {
        key: value for key in ("prompt", "completion") if (value := getattr(settings, key)) is not None
    }
    dataset = read_dataset(
        settings.path, valid=settings.valid, shape=settings.shape, columns=columns, on_progress=on_event
    ).require_clean()
    on_event(Note(f"data: {dataset.name}: {dataset.detected}"))
    for part in (dataset, dataset.valid):
        if part is not None and part.report.warnings:
            on_event(Note("\n".join(part.report.lines())))
    return dataset


def prepare_base(settings: BaseSettings, dtype: torch.dtype | None, on_event: OnRunEvent) -> LoadedBase:
    """Load a causal language model, with another chat template where one is named.

    Args:
        settings: which one, and how; its dtype is not looked at.
        dtype: of the weights, or to compute in; None keeps the stored one.
        on_event: told of progress and notes.

    Raises:
        BaseModelError: it is an encoder, or the template is none.
        ConfigError: its device is not there.
    """
    base = load_causal(settings, dtype, on_progress=on_event)
    for note in base.notes:
        on_event(Note(f"base: {note}"))
    if settings.weights == "auto":
        on_event(Note(f"base: weights {base.weights}: {base.weights_reason}"))
    return base


def encoder_for(base: LoadedBase, settings: DataSettings, *, ahead: int = 0) -> Encoder:
    """The encoder that the data settings ask for, with the row limit of the base where none is set.

    ``ahead`` positions of the context will be taken by what is about to be attached.
    """
    room = base.room - ahead
    limit = settings.max_tokens or min(LONGEST_ROW, room)
    if limit > room:
        raise ConfigError(
            f"data.max_tokens = {limit:,} is more than the base's context of {room:,} tokens",
            hint=f"set data.max_tokens={room}, or leave it unset",
        )
    return Encoder(base.tokenizer, base.chat_template, settings.train_on, limit, settings.overflow)


def encode_all(dataset: Dataset, base: LoadedBase, settings: DataSettings, on_event: OnRunEvent) -> Encoded:
    """Encode every row of a data set, and say what became of them."""
    return _encode(dataset.conversations, encoder_for(base, settings), "given", on_event)


def _encode(rows: Rows, encoder: Encoder, which: str, on_event: OnRunEvent) -> Encoded:
    encoded = encode_rows(rows, encoder, on_progress=on_event)
    if len(encoded.report):
        on_event(Note("\n".join(encoded.report.lines(5))))
    on_event(
        Note(
            f"{which} rows: {len(encoded.examples):,}, {encoded.tokens:,} tokens, {encoded.trained_tokens:,} of them "
            f"trained; {encoded.dropped:,} rows left out, {encoded.cut:,} cut"
        )
    )
    return encoded


def _attach(
    base: LoadedBase,
    recipe: Recipe,
    planned: Plan,
    rows: Encoded,
    observed: Observed | None,
    *,
    empty: bool,
    on_event: OnRunEvent,
) -> Handle:
    """Attach with a probe on the beginnings of real rows, run as training will run them."""
    packed = PackedModel(base.model)
    few = [rows.examples[index].input_ids[:PROBE_TOKENS] for index in range(min(2, len(rows.examples)))]
    ids = torch.tensor([token for row in few for token in row], device=base.model.device)

    def probe(_: torch.nn.Module) -> torch.Tensor:
        return packed.logits(packed.hidden(ids, [len(row) for row in few]))

    return attach_paths(
        base.model,
        recipe.method,
        [row.path for row in planned.rows],
        name=recipe.name,
        seed=recipe.train.seed,
        probe=probe,
        observed=observed,
        through=planned.through,
        fill=_nothing if empty else None,
        on_progress=on_event,
    )


def _nothing(_: Handle) -> None:
    """What is written into an adapter whose values come from the first process."""
