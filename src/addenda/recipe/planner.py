"""Choose how a base is held and how much of a step runs at once, before its weights are loaded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from addenda.bases import LoadedBase
from addenda.bases.weights import Weights
from addenda.core import Plan, plan
from addenda.core.progress import OnProgress
from addenda.data import Encoded
from addenda.errors import BaseModelError, OutOfMemory
from addenda.recipe.bases import load_causal
from addenda.settings import Recipe
from addenda.train import choose_device
from addenda.train.batches import RowOrder
from addenda.train.calibration import Calibration, calibrate
from addenda.train.forecast import Forecast, RowSize, Workload, forecast, token_budgets
from addenda.train.machine import calibrating, run_flop, use_machine
from addenda.train.memory import MemoryModel, memory_limit
from addenda.train.parallel import Parallel

__all__ = ["USUAL_ROW", "Setup", "choose_setup", "plan_of", "row_sizes", "weight_bytes"]

LEFT_BY_LOADING = 64 * 2**20
"""Bytes that remain in the heap when dense weights have been read; 50 to 90 MiB were seen."""

USUAL_ROW = RowSize(tokens=180, trained=108)
"""What rows are taken to be where there are none yet."""


_Load = Callable[[Weights, torch.dtype], LoadedBase]


@dataclass(frozen=True)
class Setup:
    """One way to hold a base, and what a run on it would take."""

    base: LoadedBase
    """Without its weights."""
    plan: Plan
    calibration: Calibration | None
    """None where the base cannot be cut down to a miniature."""
    memory: MemoryModel | None
    forecast: Forecast | None
    """None where it does not fit, or was not calibrated."""
    reason: str
    """Why this way, or why nothing can be foretold."""

    @property
    def dtype(self) -> str:
        """Number format of the weights, or to compute in."""
        return str(self.base.model.dtype).removeprefix("torch.")

    def document(self) -> dict[str, Any]:
        """What was chosen as plain data."""
        return {
            "weights": self.base.weights,
            "dtype": self.dtype,
            "reason": self.reason,
            "forecast": self.forecast and self.forecast.document(),
        }

    def __str__(self) -> str:
        return str(self.forecast) if self.forecast else self.reason


def plan_of(recipe: Recipe, base: LoadedBase) -> Plan:
    """Return what the recipe would put on a base."""
    return plan(base.model, recipe.method, recipe.targets, through=recipe.train.through)


def row_sizes(rows: Encoded) -> list[RowSize]:
    """Return what the planner needs to know of rows; those without a trained token are not trained on."""
    found = (RowSize(len(example), example.trained_tokens) for example in rows.examples)
    return [size for size in found if size.trained]


def choose_setup(
    recipe: Recipe,
    base: LoadedBase,
    rows: Sequence[RowSize] = (),
    heldout: Sequence[RowSize] = (),
    *,
    on_progress: OnProgress | None = None,
    parallel: Parallel | None = None,
) -> Setup:
    """Calibrate, and choose what is over soonest of what fits.

    Other forms of the base are tried only where the given one does not fit with all that its blocks keep.

    Args:
        recipe: all settings; what it sets is kept.
        base: the base as it would be loaded, without its weights.
        rows: the rows to train on; none takes one step of usual ones.
        heldout: the rows to evaluate on.
        on_progress: told how the base is converted where another form of it is tried.
        parallel: the processes that will train together; None for one alone.

    Raises:
        OutOfMemory: nothing that may be changed makes it fit; names settings that would.
        TargetError: a target matches nothing.
        MethodError: the method cannot stand on one of the layers.
    """
    device = choose_device(recipe.base.device).device
    together = parallel or Parallel()
    limit = memory_limit(device, recipe.train.memory_gib, shared_by=together.on_this_machine)
    workload = Workload(
        recipe.train, rows or [USUAL_ROW] * recipe.train.batch_size, heldout, processes=together.size
    )
    tokens = RowOrder(len(rows), recipe.train).passes * sum(row.tokens for row in rows) if rows else math.inf
    machine = use_machine(
        wanted=recipe.train.kernels == "auto", flop=run_flop(base.model, tokens), device=device
    )

    def tried(candidate: LoadedBase) -> Setup:
        planned = plan_of(recipe, candidate)
        budget = recipe.train.tokens_per_micro_batch or token_budgets(on_gpu=device.type == "cuda")[0]
        try:
            with machine.running(), calibrating(recipe.train.threads):
                calibration = calibrate(candidate.model, planned, recipe.train, device=device, tokens=budget)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = f"no forecast: '{base.name}' cannot be tried on a few of its blocks ({error})"
            return Setup(candidate, planned, None, None, None, reason)
        program = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
        program += LEFT_BY_LOADING if device.type == "cpu" and candidate.weights != "packed" else 0
        present = program + weight_bytes(candidate.model) + planned.bytes
        memory = dataclasses.replace(calibration.memory, present=present)
        memory = memory.suited(recipe.train.offload, workload.longest, limit)
        found = forecast(calibration, memory, limit, workload)
        return Setup(candidate, planned, calibration, memory, found, candidate.weights_reason or "as asked")

    def load(weights: Weights, dtype: torch.dtype) -> LoadedBase:
        settings = dataclasses.replace(recipe.base, weights=weights)
        return load_causal(settings, dtype, on_progress=on_progress, weightless=True)

    setups: list[Setup] = []
    for candidate in _forms(recipe, base, load):
        setups.append(tried(candidate))
        first = setups[0]
        if first.calibration is None or (first.forecast and not first.forecast.recompute):
            return first
    fitting = [(setup.forecast.seconds, index) for index, setup in enumerate(setups) if setup.forecast]
    if not fitting:
        raise _too_large(recipe, setups, load, limit, workload.longest)
    _, index = min(fitting)
    return dataclasses.replace(setups[index], reason=_why(setups, index))


def _forms(recipe: Recipe, base: LoadedBase, load: _Load) -> Iterator[LoadedBase]:
    """The given form, the other one of a base that comes packed, and both in bfloat16 where the format is free."""
    yield base
    forms: list[Weights] = [base.weights]
    if recipe.base.weights == "auto":
        other: Weights = "packed" if base.weights == "dense" else "dense"
        try:
            yield load(other, base.model.dtype)
            forms.append(other)
        except BaseModelError:  # it comes in one form only
            pass
    if recipe.base.dtype is None and base.model.dtype != torch.bfloat16:
        yield from (load(form, torch.bfloat16) for form in forms)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights and tables, those on the meta device as well; what is tied counts once."""
    every = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(every.values())


def _why(setups: Sequence[Setup], index: int) -> str:
    chosen = setups[index]
    others = "; ".join(
        f"{_name(setup)} {_seconds(setup.forecast)}" for place, setup in enumerate(setups) if place != index
    )
    return f"{_name(chosen)} {_seconds(chosen.forecast)}, {others}"


def _name(setup: Setup) -> str:
    return f"{setup.base.weights} {setup.dtype}"


def _seconds(found: Forecast | None) -> str:
    return "does not fit" if found is None else f"takes {found.seconds:,.0f} s"


def _too_large(recipe: Recipe, setups: Sequence[Setup], load: _Load, limit: int, longest: int) -> OutOfMemory:
    """The error that names the smallest need found, and settings with which it fits."""
    size = recipe.train.tokens_per_micro_batch or token_budgets(on_gpu=False)[-1]
    largest = max(size, longest)
    least = min((s for s in setups if s.memory), key=lambda s: _need(s.memory, largest))
    memory = least.memory
    assert memory is not None
    ledger = memory.ledger(largest, memory.blocks)
    hints = list(_smaller_weights(least, load, limit, largest))
    most = memory.most_tokens(limit)
    if longest > most >= 2:
        hints.append(f"data.max_tokens={most} (longest row now {longest})")
    if size > most >= 1:
        hints.append(f"train.tokens_per_micro_batch={most} (now {size})")
    hints.append(f"train.memory_gib={ledger.total / 2**30 + 0.05:.1f}, if the machine has it")
    return OutOfMemory(
        f"a micro-batch of {largest:,} tokens does not fit into {limit / 2**20:,.0f} MiB",
        where={"needed at least": f"{ledger} with {_name(least)} weights"},
        hint="set " + "; or ".join(hints) + "; or take a smaller base: 'addenda models'",
    )


def _smaller_weights(least: Setup, load: _Load, limit: int, tokens: int) -> Iterator[str]:
    """Forms of the base that fit, with what they need; activations are as large in any form of the same dtype."""
    assert least.memory is not None
    smaller: tuple[Weights, ...] = ("packed", "nf4")
    for weights, dtype in itertools.product(smaller, (least.base.model.dtype, torch.bfloat16)):
        try:
            base = load(weights, dtype)
        except BaseModelError:
            continue
        narrower = dtype.itemsize / least.base.model.dtype.itemsize
        memory = dataclasses.replace(
            least.memory,
            present=least.memory.present - weight_bytes(least.base.model) + weight_bytes(base.model),
            kept_per_token=least.memory.kept_per_token * narrower,
            least_per_token=least.memory.least_per_token * narrower,
        )
        if _need(memory, tokens) <= limit:
            name = f" base.dtype={str(dtype).removeprefix('torch.')}" if narrower < 1 else ""
            yield f"base.weights={weights}{name} ({_need(memory, tokens) / 2**20:,.0f} MiB)"
            return


def _need(memory: MemoryModel | None, tokens: int) -> int:
    assert memory is not None
    return memory.ledger(tokens, memory.blocks).total
