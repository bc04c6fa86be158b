"""What a run will take: memory, time and energy, from a calibration and the lengths of its rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from addenda.data.pack import plan_batches
from addenda.train.batches import RowOrder
from addenda.train.calibration import Calibration
from addenda.train.config import TrainConfig
from addenda.train.memory import Ledger, MemoryModel
from addenda.train.parallel import Parallel

__all__ = ["Forecast", "RowSize", "Workload", "forecast", "token_budgets"]

TOKENS_PER_MICRO_BATCH = (1024, 512, 256)
"""The first is where the speed of a processor levels off; more costs memory in proportion. The others are for machines
with little of it."""

TOKENS_ON_GPU = (16384, 8192, 4096, 2048, *TOKENS_PER_MICRO_BATCH)
"""A GPU is kept busy by longer rows."""

STEPS_TRIED = 200
"""Of a longer run so many steps, evenly spread, stand for all."""


def token_budgets(*, on_gpu: bool) -> tuple[int, ...]:
    """Return the numbers of tokens that may run at once, the one that memory permitting is best first."""
    return TOKENS_ON_GPU if on_gpu else TOKENS_PER_MICRO_BATCH


class RowSize(NamedTuple):
    """One row, as far as its costs go."""

    tokens: int
    trained: int


@dataclass(frozen=True)
class Workload:
    """What a run has to do."""

    config: TrainConfig
    rows: Sequence[RowSize]
    """To train on; at least one."""
    heldout: Sequence[RowSize] = ()
    """To evaluate on."""
    processes: int = 1
    """Processes that share the micro-batches of a step, each on processors of its own."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row to train on."""
        return max(row.tokens for row in self.rows)


@dataclass(frozen=True)
class Forecast:
    """What a run will take, and the sizes it was worked out for."""

    ledger: Ledger
    limit: int
    """Bytes that the run may hold."""
    tokens_per_micro_batch: int
    recompute: int
    """Blocks that run again in the largest micro-batch."""
    blocks: int
    steps: int
    tokens: int
    """Tokens of all steps."""
    step_seconds: float
    """Of all steps."""
    evaluation_seconds: float
    """Of the evaluations on held-out rows while training."""
    watts: float | None
    """Power of the processor, where the machine tells."""

    @property
    def seconds(self) -> float:
        """Of the training, evaluations within it included."""
        return self.step_seconds + self.evaluation_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens by the time spent in steps."""
        return self.tokens / max(self.step_seconds, 1e-9)

    @property
    def joules(self) -> float | None:
        """Energy of the processor, where the machine tells."""
        return None if self.watts is None else self.watts * self.seconds

    def __str__(self) -> str:
        again = f", {self.recompute} of {self.blocks} blocks run again" if self.recompute else ""
        energy = "" if self.joules is None else f", {self.joules / 3600:,.1f} Wh"
        return (
            f"forecast: {self.seconds:,.0f} s for {self.steps:,} steps and their evaluations{energy}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.tokens_per_micro_batch:,} tokens at once{again}; "
            f"memory at most {self.ledger} of {self.limit / 2**20:,.0f} MiB"
        )

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        derived = ("seconds", "tokens_per_second", "joules")
        ledger = {**asdict(self.ledger), "total": self.ledger.total}
        return {**asdict(self), "ledger": ledger, **{name: getattr(self, name) for name in derived}}


def forecast(
    calibration: Calibration, memory: MemoryModel, limit: int, workload: Workload
) -> Forecast | None:
    """Choose the micro-batch with which a run is over soonest, and say what it will take; None where nothing fits.

    Args:
        calibration: of this base, method and machine.
        memory: of the same, with what the process will hold.
        limit: bytes that the run may hold.
        workload: what there is to do; a size of micro-batch that its config sets is kept.
    """
    wished = workload.config.tokens_per_micro_batch
    sizes = (wished,) if wished else token_budgets(on_gpu=memory.on_gpu)
    tried = [_with(size, calibration, memory, limit, workload) for size in sizes]
    return min((found for found in tried if found), key=lambda found: found.seconds, default=None)


def _with(
    size: int, calibration: Calibration, memory: MemoryModel, limit: int, workload: Workload
) -> Forecast | None:
    rows, heldout = workload.rows, workload.heldout
    recompute = functools.lru_cache(maxsize=None)(lambda tokens: memory.recompute_for(tokens, limit))
    largest = max(size, workload.longest)
    if recompute(largest) is None:
        return None
    order = RowOrder(len(rows), workload.config)
    tried = range(0, order.steps, max(1, order.steps // STEPS_TRIED))
    tokens, seconds = 0, 0.0
    for step in tried:
        chosen = [rows[row] for row in order.rows_of(step)]
        seconds += calibration.update
        groups = [_sizes_of(group) for group in _groups(chosen, size)]
        tokens += sum(sum(lengths) for lengths, _ in groups)
        costs = [calibration.micro_batch(*group, recompute(sum(group[0])) or 0) for group in groups]
        seconds += _shared(costs, groups, workload.processes)
    groups = [_sizes_of(group) for group in _groups(heldout, size)]
    once = _shared([calibration.evaluation(*group) for group in groups], groups, workload.processes)
    evaluations = sum(order.evaluates_at(step) for step in range(order.steps + 1))
    share = order.steps / len(tried)
    keeps = memory.ledger(largest, keeps_memory=True).total <= limit
    return Forecast(
        ledger=memory.ledger(largest, recompute(largest) or 0, keeps_memory=keeps),
        limit=limit,
        tokens_per_micro_batch=size,
        recompute=recompute(largest) or 0,
        blocks=memory.blocks,
        steps=order.steps,
        tokens=round(tokens * share),
        step_seconds=seconds * share,
        evaluation_seconds=once * evaluations,
        watts=calibration.watts,
    )


def _sizes_of(group: Sequence[RowSize]) -> tuple[list[int], int]:
    """Tokens of each row of a micro-batch, and its trained tokens."""
    return [row.tokens for row in group], sum(row.trained for row in group)


def _shared(costs: Sequence[float], groups: Sequence[tuple[list[int], int]], processes: int) -> float:
    """The time until the last process is done, when micro-batches are dealt out as in training."""
    if not costs:
        return 0.0
    sizes = [sum(lengths) for lengths, _ in groups]
    return max(
        sum(costs[index] for index, _ in Parallel(rank, processes).turns(sizes)) for rank in range(processes)
    )


def _groups(rows: Sequence[RowSize], size: int) -> list[list[RowSize]]:
    plan = plan_batches([row.tokens for row in rows], tokens_per_batch=size)
    return [[rows[index] for index in group] for group in plan]
