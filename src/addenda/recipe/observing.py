"""What a start has to know of the base's layers, found out on the run's own rows, or from the base's original."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.packed import PackedModel
from addenda.core import Observed, OnProgress, observe
from addenda.data import Encoded
from addenda.data.rows import Example
from addenda.errors import ConfigError
from addenda.recipe.bases import load_causal
from addenda.settings import Recipe
from addenda.train.batches import packed_batch
from addenda.train.loss import packed_loss
from addenda.train.parallel import Parallel

__all__ = ["observe_base", "settle_method"]

TOKENS = 1024
"""Of a batch that is observed, where the recipe sets no size."""


def observe_base(base: LoadedBase, recipe: Recipe, rows: Encoded, on_progress: OnProgress) -> Observed | None:
    """Observe what the recipe's method begins with; None where it needs nothing of the kind.

    Inputs and gradients are of the first training rows, packed as they will be trained; of the inputs, those at
    trained tokens.

    Raises:
        ConfigError: a quantized base is asked for.
        MethodError: the rows show too little.
    """
    method, targets = recipe.method, recipe.targets
    needs = method.needs()
    if needs in (None, "weight"):
        return None
    if needs == "original":
        if base.weights == "dense":
            raise ConfigError(
                f"method '{method.name}' with these settings makes up for what quantizing took, and the base is dense",
                hint="set base.weights=nf4, or choose another start",
            )
        settings = dataclasses.replace(recipe.base, weights="dense")
        original = load_causal(settings, None, on_progress=on_progress).model
        return observe(base.model, method, targets, original=original, on_progress=on_progress)
    few = [rows.examples[index] for index in range(min(method.rows_to_observe(), len(rows.examples)))]
    packed, gradients = PackedModel(base.model), needs == "gradients"
    batches: list[tuple[partial[Tensor], Tensor]] = [
        (
            partial(_run, packed=packed, examples=group, gradients=gradients),
            torch.tensor([trained for example in group for trained in example.trained]),
        )
        for group in _groups(few, recipe.train.tokens_per_micro_batch or TOKENS)
    ]
    return observe(base.model, method, targets, batches, on_progress=on_progress)


def _groups(examples: Iterable[Example], tokens: int) -> Iterator[list[Example]]:
    """Rows in their order, as many together as have no more than so many tokens; one by itself may."""
    group: list[Example] = []
    for example in examples:
        if group and sum(map(len, group)) + len(example) > tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def _run(model: nn.Module, *, packed: PackedModel, examples: Sequence[Example], gradients: bool) -> Tensor:
    """Run rows through the model; the states, or with gradients the mean loss, in little memory."""
    batch = packed_batch(examples, next(model.parameters()).device)
    hidden = packed.hidden(batch.input_ids, batch.lengths, recompute=packed.blocks if gradients else 0)
    if not gradients:
        return hidden
    return packed_loss(packed, hidden, batch.predict_from, batch.targets, denominator=len(batch.targets))


def settle_method(recipe: Recipe, observed: Observed | None, parallel: Parallel) -> Recipe:
    """Derive the settings that follow from what the first process observed."""
    settled = parallel.agree((recipe.method if observed is None else observed.method).settings())
    before = recipe.method.settings()
    for key, value in settled.items():
        if value != before[key]:
            recipe = recipe.derive(f"method.{key}", value, "what the training rows show")
    return recipe
