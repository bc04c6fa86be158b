"""The training loop, to be read in one piece."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from addenda.core.handle import Handle
from addenda.data.rows import Example
from addenda.errors import ConfigError
from addenda.train import guards
from addenda.train.batches import UsableRows, packed_batch
from addenda.train.config import TrainConfig
from addenda.train.evaluation import Evaluate, heldout_nll, judge, run_evaluation, training_mode
from addenda.train.events import EvalEvent, Event, NoticeEvent, OnEvent, StepEvent
from addenda.train.failpoints import failpoint
from addenda.train.interrupt import Interrupted, Interrupts
from addenda.train.lock import lock_run
from addenda.train.loss import packed_loss
from addenda.train.memory import out_of_memory_named
from addenda.train.optimizer import clip, learning_rate_factor, set_learning_rate, warmup_steps
from addenda.train.parallel import Parallel, processes
from addenda.train.session import Session, begin, open_session
from addenda.train.sharding import sharded
from addenda.train.state import load_adapter, seed_generators

__all__ = [
    "CHECKPOINTS",
    "HasModel",
    "Steps",
    "TrainResult",
    "finish_run",
    "out_of_memory_hints",
    "own_evaluation",
    "own_process_settings",
    "run_steps",
    "train",
]

Steps = Generator[list[Example], float | None, None]
"""The steps of a run, as `run_steps` makes them."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within the run folder."""


class HasModel(Protocol):
    """What is trained on: a loaded base."""

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapter."""


@dataclass(frozen=True)
class TrainResult:
    """What a run did."""

    steps: int
    """Optimiser steps done."""
    epochs: float
    """Passes over the training rows done."""
    trained_tokens: int
    """Prediction targets seen."""
    context_tokens: int
    """Tokens seen that were context only."""
    seconds: float
    """Time spent, evaluations and checkpoints included, over all resumed parts."""
    seconds_before: float
    """Of it, in the parts before this one; 0 where the run was not resumed."""
    tokens_per_second: float
    """Trained and context tokens by the time spent in optimiser steps."""
    best_step: int
    """The step whose adapter was kept."""
    stopped_early: bool
    """Whether it stopped because the held-out loss no longer fell."""
    history: tuple[Mapping[str, Any], ...]
    """Every evaluation: ``step``, ``epoch``, ``metrics``, ``best``."""


def train(
    base: HasModel,
    handle: Handle,
    train_examples: Sequence[Example],
    heldout_examples: Sequence[Example],
    config: TrainConfig,
    *,
    run_dir: str | Path,
    on_event: OnEvent,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    identity: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train an adapter; when it returns, the adapter on the model is the best one of the run.

    Started by torchrun in several processes, all train the one run: each calls this with the same arguments. The first
    process writes and tells; the others need no run folder.

    Args:
        base: holds the model that carries the adapter.
        handle: the adapter.
        train_examples: rows to learn from.
        heldout_examples: rows to judge by, used where ``evaluate`` is None; may be empty.
        config: all settings.
        run_dir: the run's folder; checkpoints go into ``checkpoints/`` there. Held by one process at a time.
        on_event: told of every step, evaluation and checkpoint.
        evaluate: measures the model as it is, before, during and after training; returns ``nll_per_token`` at least.
            Every process calls it, and what the first one's returns counts.
        resume: go on from the newest whole checkpoint; the result has the same bits as that of an unbroken run, or on
            another number of processes the same but for the order of additions.
        identity: further facts that a resumed run must share, such as hashes of the data and the chat template.

    Raises:
        TrainingError: a number is not finite, an adapter gets no gradient, the run diverges, or nothing moved.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        BusyError: another process trains in ``run_dir``.
        CheckpointError: the checkpoints cannot be used, or are of another run.
        ConfigError: ``run_dir`` holds a run that is not to be resumed.
        DataError: no row has a token to train on.
        DiskFullError: a checkpoint found no room; the one before is whole.
        OutOfMemory: a step did not fit into memory.
    """
    folder = Path(run_dir)
    with _processes_on(folder) as parallel, Interrupts() as interrupts, own_process_settings(config, handle):
        session = open_session(
            base.model,
            handle,
            train_examples,
            config,
            folder=folder / CHECKPOINTS,
            emit=on_event if parallel.first else _silent,
            identity=identity or {},
            parallel=dataclasses.replace(parallel, lockstep=config.sharding == "full"),
        )
        begin(session, resume=resume, heldout_rows=len(heldout_examples))
        seconds_before = session.state.seconds
        evaluate = evaluate or own_evaluation(session, heldout_examples)
        with (
            training_mode(base.model, handle),
            out_of_memory_named(out_of_memory_hints(session)),
            session.machine.running(),
        ):
            if not session.state.finished:
                with _sharded_as_asked(session):
                    _run(session, evaluate, interrupts)
        result = finish_run(session, seconds_before)
        [signum] = parallel.most(interrupts.signum)
        if signum:  # after the last step: all is saved, but whoever called must stop too
            raise Interrupted(signum, str(session.folder))
        return result


def _run(session: Session, evaluate: Evaluate | None, interrupts: Interrupts) -> None:
    """Make every step of a run."""
    steps = run_steps(session, evaluate, interrupts)
    with contextlib.suppress(StopIteration):
        rows = next(steps)
        while True:
            rows = steps.send(_gradients(session, rows, interrupts))


def _gradients(session: Session, examples: Sequence[Example], interrupts: Interrupts) -> float | None:
    """Add the gradients of a step's rows, and return their loss in this process; None where the step is given up."""
    config, parallel = session.config, session.parallel
    groups = session.micro_batches(examples)
    step = session.state.step + 1
    trained = sum(example.trained_tokens for example in examples)
    loss = 0.0
    for index, weight in parallel.turns([sum(map(len, group)) for group in groups]):
        if interrupts.requested and parallel.alone:
            return None
        seed_generators(config.seed, step, index)
        batch = packed_batch(groups[index], session.device)
        recompute = session.recompute(len(batch.input_ids))
        with session.arena.serving():
            with session.offloading():
                hidden = session.packed.hidden(
                    batch.input_ids, batch.lengths, prompts=batch.prompts, recompute=recompute
                )
            # Divided by the trained tokens of the whole step, the losses of its micro-batches add up to the mean.
            part = packed_loss(session.packed, hidden, batch.predict_from, batch.targets, denominator=trained)
            guards.require_finite_loss(part, step=step, rows=batch.rows, losses=session.state.recent_losses)
            (weight * part).backward()
        loss += weight * float(part.detach())
    return None if interrupts.requested and parallel.alone else loss


def run_steps(session: Session, evaluate: Evaluate | None, interrupts: Interrupts) -> Steps:
    """Evaluate, save and step, until the last step is done and evaluated.

    Yields the rows of each step, and goes on when their gradients have been added to the adapter's: it is sent their
    loss in this process, or None where the step is given up. Everything a resumed run needs is decided by
    ``session.state`` at the top of the loop, so a checkpoint made there continues with the same bits.
    """
    state, order, config, handle = session.state, session.order, session.config, session.handle
    parallel = session.parallel
    parameters = [p for p in handle.parameters() if p.requires_grad]
    warmup = warmup_steps(order.steps, config.warmup_fraction)
    began, began_at_step, seconds_before = time.monotonic(), state.step, state.seconds
    handle.forget()  # what passes before the run left

    while True:
        state.seconds = seconds_before + time.monotonic() - began
        signum, save_due = parallel.most(interrupts.signum, session.save_due())
        if signum:
            raise Interrupted(signum, str(session.save()))

        if evaluate is not None and order.evaluates_at(state.step) and not state.evaluated:
            started = time.monotonic()
            try:
                seed_generators(config.seed, state.step, "evaluation")
                with interrupts.at_once(alone=parallel.alone):
                    metrics = run_evaluation(evaluate, handle, step=state.step, device=session.device)
            except Interrupted:
                continue  # saved at the top; the evaluation is made when the run is resumed
            metrics = parallel.agree(metrics)
            best = judge(state, metrics, epoch=session.epoch, patience=config.patience)
            if best:
                session.keep_best()
            session.emit(EvalEvent(state.step, session.epoch, metrics, best, time.monotonic() - started))
        if state.step >= order.steps or state.stopped_early:
            break
        if save_due:
            session.save()

        started = time.monotonic()
        step = state.step + 1
        examples = session.step_rows()
        refs = [example.row for example in examples]
        tokens = sum(map(len, examples))
        trained = sum(example.trained_tokens for example in examples)
        own_loss = yield examples
        if own_loss is None:  # what it has added is undone
            session.optimizer.zero_grad(set_to_none=True)
            handle.forget()
            continue

        parallel.add_gradients(parameters)
        parallel.add(handle.sums())
        if (
            penalty := handle.penalty()
        ) is not None:  # every process adds it whole, after the sum over processes
            penalty.backward()
        [loss] = parallel.total(own_loss)
        norm = clip(parameters, config.clip_norm)
        guards.require_finite_gradients(handle, norm, step=step, rows=refs)
        if step == 1:
            guards.require_reached(handle, step=step)
        factor = learning_rate_factor(
            step, total=order.steps, warmup=warmup, schedule=config.schedule, floor=config.min_lr_fraction
        )
        set_learning_rate(session.optimizer, session.learning_rate * factor)
        failpoint("step.before_update")
        session.optimizer.step()
        handle.after_update(step=step, of_steps=order.steps)
        session.optimizer.zero_grad(set_to_none=True)
        guards.require_finite_adapter(handle, step=step, rows=refs)
        state.enter_step(loss, tokens=tokens, trained_tokens=trained, seconds=time.monotonic() - started)
        failpoint("step.after_update")

        elapsed = time.monotonic() - began
        session.emit(
            StepEvent(
                step=state.step,
                of_steps=order.steps,
                epoch=session.epoch,
                loss=loss,
                lr=session.learning_rate * factor,
                grad_norm=float(norm),
                tokens=tokens,
                trained_tokens=trained,
                tokens_per_second=tokens / max(time.monotonic() - started, 1e-9),
                seconds=seconds_before + elapsed,
                eta_seconds=elapsed / (state.step - began_at_step) * (order.steps - state.step),
            )
        )
        guards.require_no_divergence(state, learning_rate=session.learning_rate)


def finish_run(session: Session, seconds_before: float) -> TrainResult:
    """Save the end of the run, put the best adapter on the model, and sum up."""
    state = session.state
    if not state.finished:
        guards.require_moved(session.handle, state.initial_sha256)
        state.finished = True
        session.save()
        _say_if_worse(session)
    if session.best is not None:
        load_adapter(session.handle, session.best)
    failpoint("finish")
    return TrainResult(
        steps=state.step,
        epochs=session.epoch,
        trained_tokens=state.trained_tokens,
        context_tokens=state.tokens - state.trained_tokens,
        seconds=state.seconds,
        seconds_before=seconds_before,
        tokens_per_second=state.tokens / max(state.step_seconds, 1e-9),
        best_step=state.step if state.best_step is None else state.best_step,
        stopped_early=state.stopped_early,
        history=tuple(state.evaluations),
    )


def _say_if_worse(session: Session) -> None:
    state = session.state
    untrained = [e["metrics"]["nll_per_token"] for e in state.evaluations if e["step"] == 0]
    if untrained and state.best_nll is not None and state.best_nll >= untrained[0]:
        found = f"{state.best_nll:.4g} nats per token, the base's {untrained[0]:.4g}"
        session.emit(
            NoticeEvent(state.step, f"no adapter is better than the base on held-out rows: best {found}")
        )


def own_evaluation(session: Session, examples: Sequence[Example]) -> Evaluate | None:
    """Return the mean nll on held-out rows as an evaluation; says so where there are none, and returns None."""
    rows = UsableRows(examples)
    if not rows:
        text = "no held-out rows: the last adapter is kept, whatever it is worth"
        session.emit(NoticeEvent(session.state.step, text))
        return None
    return lambda: heldout_nll(
        session.packed, rows, tokens=session.tokens_per_micro_batch, parallel=session.parallel
    )


def _silent(_: Event) -> None:
    """What the processes beside the first tell: nothing."""


@contextlib.contextmanager
def _processes_on(folder: Path) -> Iterator[Parallel]:
    """Join the other processes; the first one holds the run folder."""
    with processes() as parallel, lock_run(folder) if parallel.first else contextlib.nullcontext():
        yield parallel


def _sharded_as_asked(session: Session) -> contextlib.AbstractContextManager[None]:
    if session.parallel.alone or not session.parallel.lockstep:
        return contextlib.nullcontext()
    if session.packed.path != "packed":
        raise ConfigError(
            "a base that cannot run packed rows cannot be sharded",
            where={"reason": session.packed.reason},
            hint="set train.sharding=none",
        )
    return sharded(session.model, session.parallel, device=session.device)


@contextlib.contextmanager
def own_process_settings(config: TrainConfig, handle: Handle) -> Iterator[None]:
    """Keep the caller's thread count and random generators out of the run, and the run out of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    devices = {p.device for p in handle.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        torch.set_num_threads(threads)


def out_of_memory_hints(session: Session) -> dict[str, tuple[object, object]]:
    """Return settings with which a run takes less memory: their values now, and smaller ones."""
    tokens, longest = session.tokens_per_micro_batch, session.rows.longest
    settings: dict[str, tuple[object, object]] = {
        "train.tokens_per_micro_batch": (tokens, max(1, tokens // 2)),
        "data.max_tokens": (f"longest row {longest}", max(2, longest // 2)),
    }
    rank = getattr(session.handle.method, "rank", None)
    if isinstance(rank, int) and rank > 1:
        settings["method.rank"] = (rank, rank // 2)
    else:
        settings["base.dtype"] = (next(session.model.parameters()).dtype, "bfloat16")
    return settings
