"""Which rows each optimiser step sees: a function of the seed and the step alone, so resuming replays nothing."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

from addenda.data.pack import PackedBatch, collate, epoch_order
from addenda.data.rows import Example
from addenda.train.config import TrainConfig

__all__ = ["RowOrder", "UsableRows", "packed_batch"]


class UsableRows(Sequence[Example]):
    """The examples that have a token to train on, left where they are: a store of a million is not copied.

    Example:
        >>> from addenda.data.rows import RowRef
        >>> rows = UsableRows([Example((7, 8), (False, on), RowRef("a", 1, 0)) for on in (True, False, True)])
        >>> len(rows), rows.left_out, rows.longest
        (2, 1, 2)
    """

    sha256: str
    """Hash of token ids and loss masks, in order."""
    longest: int
    """Tokens of the longest row; 0 where there is none."""
    tokens: int
    """Tokens of all rows together."""
    left_out: int
    """Rows without a token to train on."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._usable: list[int] = []
        self.longest = self.tokens = 0
        digest = hashlib.sha256()
        for index, example in enumerate(examples):
            if any(example.trained):
                self._usable.append(index)
                self.longest = max(self.longest, len(example))
                self.tokens += len(example)
                digest.update(array("q", example.input_ids).tobytes())
                digest.update(bytes(example.trained) + b"/")
        self.sha256 = digest.hexdigest()
        self.left_out = len(examples) - len(self._usable)

    def __len__(self) -> int:
        return len(self._usable)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._examples[place] for place in self._usable[index]]
        return self._examples[self._usable[index]]


@dataclass(frozen=True)
class RowOrder:
    """The steps of a run over ``rows`` rows; the last step of an epoch takes what is left over.

    Example:
        >>> order = RowOrder(rows=5, config=TrainConfig(epochs=2, batch_size=2))
        >>> order.steps_per_epoch, order.steps, len(order.rows_of(2))
        (3, 6, 1)
        >>> sorted(row for step in range(3) for row in order.rows_of(step))
        [0, 1, 2, 3, 4]
    """

    rows: int
    config: TrainConfig

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the rows."""
        return -(-self.rows // self.config.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        all_epochs = self.config.epochs * self.steps_per_epoch
        return all_epochs if self.config.max_steps is None else min(all_epochs, self.config.max_steps)

    @property
    def passes(self) -> float:
        """How often the rows are gone through in all."""
        return self.steps / max(self.steps_per_epoch, 1)

    @property
    def steps_per_evaluation(self) -> int:
        """Optimiser steps from one evaluation to the next."""
        if self.config.eval_every_steps is not None:
            return self.config.eval_every_steps
        return max(1, round(self.steps_per_epoch / self.config.evals_per_epoch))

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of the optimiser step after ``step`` steps, 0 <= step < steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.config.batch_size
        return _shuffled(self.rows, self.config.seed, epoch)[start : start + self.config.batch_size]

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are done after ``step`` steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch + min(within * self.config.batch_size, self.rows) / self.rows

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after ``step`` steps: before the first, regularly, and after the last."""
        return step % self.steps_per_evaluation == 0 or step == self.steps


@functools.lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    return epoch_order(rows, seed=seed, epoch=epoch)


def packed_batch(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """Lay examples end to end in one row on the model's device."""
    batch = collate(examples)
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids.to(device),
        predict_from=batch.predict_from.to(device),
        targets=batch.targets.to(device),
    )
