"""Which rows each optimiser step sees: a function of the seed and the step alone, so resuming replays nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from addenda.data.pack import PackedBatch, collate, epoch_order
from addenda.data.rows import Example
from addenda.train.config import TrainConfig

__all__ = ["RowOrder", "packed_batch"]


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
