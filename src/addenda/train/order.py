"""Which rows each optimiser step sees: a function of the seed and the step alone, so nothing need be replayed."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch

from addenda.train.config import TrainConfig

__all__ = ["RowOrder", "shuffled"]


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
        return list(shuffled(self.rows, self.config.seed, epoch)[start : start + self.config.batch_size])

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are done after ``step`` steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch + min(within * self.config.batch_size, self.rows) / self.rows

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after ``step`` steps: before the first, regularly, and after the last."""
        return step % self.steps_per_evaluation == 0 or step == self.steps


@functools.lru_cache(maxsize=2)
def shuffled(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the numbers below ``rows`` in an order that depends on the seed and the epoch alone.

    Example:
        >>> shuffled(4, 0, 0) == shuffled(4, 0, 0), sorted(shuffled(4, 0, 1))
        (True, [0, 1, 2, 3])
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return tuple(torch.randperm(rows, generator=generator).tolist())
