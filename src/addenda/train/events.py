"""What the loop tells the world while it runs; the loop itself prints and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = [
    "CheckpointEvent",
    "EvalEvent",
    "Event",
    "NoticeEvent",
    "OnEvent",
    "ResumeEvent",
    "StartEvent",
    "StepEvent",
]


@dataclass(frozen=True)
class StartEvent:
    """The run begins (also when it is resumed): what will be done, and with which derived settings."""

    step: int
    """Optimiser steps already done: 0, or that of the checkpoint."""
    resumed: bool
    of_steps: int
    """Optimiser steps in all."""
    epochs: int
    rows: int
    """Training rows."""
    heldout_rows: int
    trainable_parameters: int
    learning_rate: float
    tokens_per_micro_batch: int
    machine: str
    """Threads, compiled kernels and allocator, as chosen for this run."""
    memory: str
    """What the largest micro-batch takes, of what there is, and what was chosen so that it fits."""
    dtype: str
    """Number format of the base."""
    path: str
    """``packed``, or ``general`` where the model cannot run packed rows."""
    path_reason: str
    processes: int = 1
    """Processes that train together."""


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step is done."""

    step: int
    of_steps: int
    epoch: float
    """Epochs done, with the fraction of the present one."""
    loss: float
    """Mean nll over the trained tokens of the step, in nats per token."""
    lr: float
    grad_norm: float
    """Norm of the gradient before clipping."""
    tokens: int
    """Tokens of the step, context included."""
    trained_tokens: int
    """Tokens of the step that are prediction targets."""
    tokens_per_second: float
    """Tokens of the step, context included, by its duration."""
    seconds: float
    """Training time so far, over all resumed parts; evaluations and checkpoints count."""
    eta_seconds: float
    """Time left at the pace of this process so far."""


@dataclass(frozen=True)
class EvalEvent:
    """An evaluation on held-out rows is done."""

    step: int
    epoch: float
    metrics: Mapping[str, float]
    """``nll_per_token`` in nats, and whatever else the evaluation returned."""
    best: bool
    """Whether this is the best trained adapter so far."""
    seconds: float
    """What the evaluation took."""


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint is on disk and verified."""

    step: int
    folder: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class ResumeEvent:
    """The run goes on from a checkpoint."""

    step: int
    folder: str
    skipped: tuple[str, ...]
    """Newer checkpoints that could not be used, each with its reason."""


@dataclass(frozen=True)
class NoticeEvent:
    """Something the user should know; the run goes on."""

    step: int
    message: str


Event = StartEvent | StepEvent | EvalEvent | CheckpointEvent | ResumeEvent | NoticeEvent
OnEvent = Callable[[Event], None]
"""A watcher: called from the training thread, must return quickly; what it raises ends the run."""
