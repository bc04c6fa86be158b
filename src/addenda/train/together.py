"""Several adapters trained in one process over one base: each has its own rows, steps, optimiser and run folder.

The rows of all of them are packed into the same micro-batches, where each row runs with its own adapter. The frozen
products, which are most of the work, are made for all rows at once, and the base is held once. An adapter gets the
gradients of its own rows alone, so it learns what it would have learnt by itself, to rounding.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from addenda.core.activating import activated
from addenda.core.composition import Rows
from addenda.core.handle import Handle
from addenda.data.pack import plan_batches
from addenda.data.rows import Example
from addenda.errors import ConfigError, TrainingError
from addenda.train import guards
from addenda.train.batches import UsableRows, packed_batch
from addenda.train.config import TrainConfig
from addenda.train.evaluation import Evaluate, training_mode
from addenda.train.events import OnEvent
from addenda.train.interrupt import Interrupted, Interrupts
from addenda.train.lock import lock_run
from addenda.train.loop import (
    CHECKPOINTS,
    HasModel,
    Steps,
    TrainResult,
    finish_run,
    out_of_memory_hints,
    own_evaluation,
    own_process_settings,
    run_steps,
)
from addenda.train.loss import packed_loss
from addenda.train.memory import out_of_memory_named
from addenda.train.parallel import Parallel
from addenda.train.session import Session, begin, open_session
from addenda.train.state import seed_generators

__all__ = ["PROCESS_SETTINGS", "Job", "train_together"]

PROCESS_SETTINGS = ("kernels", "memory_gib", "offload", "sharding", "threads", "tokens_per_micro_batch")
"""Settings of the process rather than of a run."""


@dataclass(frozen=True)
class Job:
    """One adapter to train, and what on; all as for `addenda.train.loop.train`."""

    handle: Handle
    train_examples: Sequence[Example]
    config: TrainConfig
    run_dir: str | Path
    on_event: OnEvent
    heldout_examples: Sequence[Example] = ()
    evaluate: Evaluate | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False


def train_together(base: HasModel, jobs: Sequence[Job]) -> list[TrainResult | TrainingError]:
    """Train the adapters of all jobs in one process, and leave each with its best weights.

    Args:
        base: the model that carries all the adapters; packed rows must run on it.
        jobs: at least one, each with an adapter and a run folder of its own. Their numbers of steps may differ.

    Returns:
        For each job its result, or the error that ended it: one that fails leaves the others to go on.

    Raises:
        ConfigError: two jobs share an adapter or a folder, differ in a setting of the process, or the base cannot run
            packed rows; all problems are named.
        Interrupted: SIGINT or SIGTERM came; every job is saved.
        OutOfMemory, BusyError, CheckpointError, DataError: as for one run.
    """
    _require_apart(jobs)
    model, config = base.model, jobs[0].config
    handles = [job.handle for job in jobs]
    with (
        contextlib.ExitStack() as locks,
        Interrupts() as interrupts,
        own_process_settings(config, jobs[0].handle),
    ):
        for job in jobs:
            locks.enter_context(lock_run(Path(job.run_dir)))
        runs = [_Run(job, session) for job, session in zip(jobs, _sessions(base, jobs), strict=True)]
        first = runs[0].session
        with (
            training_mode(model, *handles),
            out_of_memory_named(out_of_memory_hints(first)),
            first.machine.running(),
        ):
            _drive(runs, interrupts)
        results = [run.result() for run in runs]
        if interrupts.signum:
            raise Interrupted(interrupts.signum, ", ".join(str(run.session.folder) for run in runs))
        return results


def _require_apart(jobs: Sequence[Job]) -> None:
    found = [] if jobs else ["there is no job"]
    for what, values in (
        ("adapter", [job.handle.name for job in jobs]),
        ("run folder", [str(Path(job.run_dir).resolve()) for job in jobs]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        found += [f"{what} '{value}' is in several jobs" for value in twice]
    if len({id(job.handle.model) for job in jobs}) > 1:
        found.append("the adapters are on different models")
    for key in PROCESS_SETTINGS:
        set_to = sorted({repr(getattr(job.config, key)) for job in jobs})
        found += [f"train.{key} differs: {', '.join(set_to)}"] if len(set_to) > 1 else []
    if jobs and jobs[0].config.sharding != "none":
        found.append("train.sharding must be none")
    if found:
        raise ConfigError(
            "; ".join(found),
            hint="jobs of one process need adapters and folders of their own, and one engine",
        )


def _sessions(base: HasModel, jobs: Sequence[Job]) -> list[Session]:
    """Open every run, the first with the engine of all."""
    longest = max(UsableRows(job.train_examples).longest for job in jobs)
    others = sum(job.handle.trainable_parameters for job in jobs[1:])
    sessions: list[Session] = []
    for job in jobs:
        first = sessions[0] if sessions else None
        with activated(base.model, job.handle.name):
            session = open_session(
                base.model,
                job.handle,
                job.train_examples,
                job.config,
                folder=Path(job.run_dir) / CHECKPOINTS,
                emit=job.on_event,
                identity=job.identity,
                parallel=Parallel(),
                beside=first,
                longest=longest,
                also_trained=others if first is None else 0,
            )
            if session.packed.path != "packed":
                raise ConfigError(
                    "a base that cannot run packed rows cannot train several adapters at once",
                    where={"reason": session.packed.reason},
                    hint="train them one after another",
                )
            begin(session, resume=job.resume, heldout_rows=len(job.heldout_examples))
            sessions.append(session)
    return sessions


class _Run:
    """A job on its way: its session, its steps, and the rows whose gradients it waits for."""

    def __init__(self, job: Job, session: Session) -> None:
        self.job, self.session = job, session
        self.waiting: list[Example] = []
        self.stopped: TrainingError | Interrupted | None = None
        self.over = session.state.finished
        self.loss = 0.0
        self._seconds_before = session.state.seconds
        self._steps: Steps | None = None

    @property
    def name(self) -> str:
        return self.job.handle.name

    def advance(self, interrupts: Interrupts, *, given_up: bool = False) -> None:
        """Go on to the next rows, with the loss of those whose gradients are there."""
        if self.over:
            return
        with self._acting():
            if self._steps is None:
                evaluate = self.job.evaluate or own_evaluation(self.session, self.job.heldout_examples)
                self._steps = run_steps(self.session, evaluate, interrupts)
                self.waiting = next(self._steps)
            else:
                self.waiting = self._steps.send(None if given_up else self.loss)
            self.loss = 0.0

    @contextlib.contextmanager
    def _acting(self) -> Iterator[None]:
        """The run's own adapter acts, and what ends the run ends this one alone."""
        with activated(self.session.model, self.name):
            try:
                yield
            except StopIteration:
                self.over = True
            except (TrainingError, Interrupted) as stopped:
                self.end(stopped)

    def end(self, stopped: TrainingError | Interrupted) -> None:
        """Take no further step."""
        self.over, self.stopped, self.waiting = True, stopped, []
        self.session.optimizer.zero_grad(set_to_none=True)

    def result(self) -> TrainResult | TrainingError:
        """Return what the run did, its best adapter on the model, or why it ended."""
        if isinstance(self.stopped, Interrupted):
            raise self.stopped
        if self.stopped is not None:
            return self.stopped
        with activated(self.session.model, self.name):
            try:
                return finish_run(self.session, self._seconds_before)
            except TrainingError as failed:
                return failed


def _drive(runs: Sequence[_Run], interrupts: Interrupts) -> None:
    """Make the steps of all runs, one of each at a time."""
    given_up = False
    for at_once in itertools.count():
        for run in runs:
            run.advance(interrupts, given_up=given_up)
        going = [run for run in runs if not run.over]
        if not going:
            return
        given_up = not _gradients(going, at_once, interrupts)


def _gradients(runs: Sequence[_Run], at_once: int, interrupts: Interrupts) -> bool:
    """Add the gradients of the rows that the runs wait for; False where a signal came and the steps are given up."""
    engine = runs[0].session.beside or runs[0].session
    rows = [(place, example) for place, run in enumerate(runs) for example in run.waiting]
    lengths = [len(example) for _, example in rows]
    for index, group in enumerate(plan_batches(lengths, tokens_per_batch=engine.tokens_per_micro_batch)):
        if interrupts.requested:
            return False
        seed_generators(engine.config.seed, at_once, index)
        chosen = sorted((rows[i] for i in group if not runs[rows[i][0]].over), key=lambda row: row[0])
        if chosen:
            _micro_batch(engine, runs, chosen)
    return not interrupts.requested


def _micro_batch(engine: Session, runs: Sequence[_Run], chosen: Sequence[tuple[int, Example]]) -> None:
    """One forward and backward pass over rows of several runs, those of a run side by side."""
    batch = packed_batch([example for _, example in chosen], engine.device)
    of = tuple(runs[place].name for place, _ in chosen)
    recompute = engine.recompute(len(batch.input_ids))
    with activated(engine.model, Rows(of, batch.lengths)), engine.arena.serving():
        with engine.offloading():
            hidden = engine.packed.hidden(
                batch.input_ids, batch.lengths, prompts=batch.prompts, recompute=recompute
            )
        parts: list[Tensor] = []
        start = 0
        for place, own in itertools.groupby(chosen, key=lambda row: row[0]):
            run, examples = runs[place], [example for _, example in own]
            stop = start + sum(example.trained_tokens for example in examples)
            part = packed_loss(
                engine.packed,
                hidden,
                batch.predict_from[start:stop],
                batch.targets[start:stop],
                denominator=sum(example.trained_tokens for example in run.waiting),
            )
            start = stop
            try:
                guards.require_finite_loss(
                    part,
                    step=run.session.state.step + 1,
                    rows=[example.row for example in examples],
                    losses=run.session.state.recent_losses,
                )
            except TrainingError as failed:
                run.end(failed)
                continue
            parts.append(part)
            run.loss += float(part.detach())
        if parts:
            torch.stack(parts).sum().backward()
