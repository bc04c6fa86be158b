"""The parts of one run, made and checked before the first step, and saved between two steps."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from addenda.bases.packed import PackedModel
from addenda.core.fingerprints import fingerprint
from addenda.core.handle import Handle
from addenda.data.pack import plan_batches
from addenda.data.rows import Example
from addenda.errors import CheckpointError, ConfigError, DataError, OutOfMemory
from addenda.memory.arena import Arena
from addenda.train.batches import RowOrder, UsableRows
from addenda.train.checkpoint import (
    Checkpoint,
    Found,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside,
    share_checkpoint,
    sweep,
)
from addenda.train.config import TrainConfig
from addenda.train.events import CheckpointEvent, NoticeEvent, OnEvent, ResumeEvent, StartEvent
from addenda.train.forecast import token_budgets
from addenda.train.guards import require_trainable
from addenda.train.machine import Machine, run_flop, set_allocator, use_machine
from addenda.train.memory import Ledger, MemoryModel, measure_memory, memory_limit
from addenda.train.offload import Offload, require_offloadable
from addenda.train.optimizer import make_optimizer
from addenda.train.parallel import Parallel
from addenda.train.state import (
    RunState,
    adapter_tensors,
    digest_of_tensors,
    load_adapter,
    load_optimizer,
    optimizer_tensors,
    require_same_run,
)

__all__ = ["Session", "begin", "open_session"]


@dataclass
class Session:
    """What a run works with. ``state`` is all that changes beside the adapter and the optimiser."""

    model: nn.Module
    handle: Handle
    packed: PackedModel
    optimizer: torch.optim.Optimizer
    rows: UsableRows
    order: RowOrder
    config: TrainConfig
    learning_rate: float
    tokens_per_micro_batch: int
    device: torch.device
    folder: Path
    """Where the checkpoints are."""
    identity: dict[str, str]
    emit: OnEvent
    state: RunState
    parallel: Parallel
    machine: Machine
    memory: MemoryModel
    memory_limit: int
    offload: Offload | None = None
    """Where activations wait in the machine's memory, by what they do."""
    best: dict[str, Tensor] | None = None
    saved_step: int | None = None
    saved_at: float = 0.0
    beside: Session | None = None
    """Another run of the same process on the same base, whose engine and arena this one uses."""
    arena: Arena = field(init=False)
    """Where a micro-batch's tensors lie; of no size where they lie elsewhere."""

    def __post_init__(self) -> None:
        self.arena = self._new_arena()

    def _new_arena(self) -> Arena:
        if self.beside is not None:
            return self.beside.arena
        if self.device.type != "cpu" or self.config.sharding != "none":
            return Arena(0)
        ledger = self.ledger()
        return Arena(ledger.activations + ledger.overhead)

    def ledger(self) -> Ledger:
        """Return what the largest micro-batch takes."""
        tokens = max(self.tokens_per_micro_batch, self.rows.longest)
        recompute = self.recompute(tokens)
        return self.memory.ledger(tokens, recompute, keeps_memory=self.machine.keeps_memory)

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.order.epoch_of(self.state.step)

    def step_rows(self) -> list[Example]:
        """Return the rows of the step to be made."""
        return [self.rows[row] for row in self.order.rows_of(self.state.step)]

    def micro_batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return rows in groups that fit into memory."""
        lengths = [len(example) for example in examples]
        plan = plan_batches(lengths, tokens_per_batch=self.tokens_per_micro_batch)
        return [[examples[i] for i in group] for group in plan]

    def recompute(self, tokens: int) -> int:
        """Return how many blocks keep their input alone in a micro-batch of this many tokens."""
        found = self.memory.recompute_for(tokens, self.memory_limit)
        return self.memory.blocks if found is None else found

    def offloading(self) -> AbstractContextManager[None]:
        """Send what the forward pass keeps to the machine's memory within the block, if it was so decided."""
        return nullcontext() if self.offload is None else self.offload.on()

    def keep_best(self) -> None:
        """Keep a copy of the adapter as it is now."""
        self.best = adapter_tensors(self.handle)

    def save_due(self) -> bool:
        """Whether a checkpoint is due now."""
        step, every, minutes = self.state.step, self.config.save_every_steps, self.config.save_every_minutes
        if step in (0, self.saved_step):
            return False
        by_time = minutes is not None and time.monotonic() - self.saved_at >= 60.0 * minutes
        return by_time or (every is not None and step % every == 0)

    def save(self) -> Path:
        """Write a checkpoint of the state between two steps, and say so; the first process writes, all wait for it.

        Raises:
            DiskFullError: there is no room.
            CheckpointError: it cannot be written.
        """
        started = time.monotonic()
        folder = self.folder
        if self.parallel.first:
            folder, size = save_checkpoint(self._checkpoint(), folder, keep=self.config.keep_checkpoints)
            self.emit(CheckpointEvent(self.state.step, str(folder), size, time.monotonic() - started))
        written = Path(self.parallel.agree(str(folder)))
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        return written

    def _checkpoint(self) -> Checkpoint:
        epoch, within = divmod(self.state.step, self.order.steps_per_epoch)
        state = {
            "run": self.state.document(),
            "epoch": epoch,
            "position": within * self.config.batch_size,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "identity": self.identity,
            "versions": self._versions(),
        }
        adapter = adapter_tensors(self.handle)
        return Checkpoint(
            self.state.step, adapter, optimizer_tensors(self.handle, self.optimizer), self.best, state
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back to where a checkpoint found it.

        Raises:
            CheckpointError: it is of another run, or lacks a part.
        """
        lacking = {"run", "identity", "versions", "tokens_per_micro_batch"} - set(checkpoint.state)
        if lacking:
            raise CheckpointError(
                f"the checkpoint's state lacks {', '.join(sorted(lacking))}", hint="train anew"
            )
        require_same_run(checkpoint.state["identity"], self.identity)
        state = RunState.from_document(checkpoint.state["run"])
        load_adapter(self.handle, checkpoint.adapter)
        load_optimizer(self.handle, self.optimizer, checkpoint.optimizer)
        self.state, self.best, self.saved_step = state, checkpoint.best, state.step
        # Derived from the memory that was free then; another size would round otherwise.
        self.tokens_per_micro_batch = int(checkpoint.state["tokens_per_micro_batch"])
        self.arena = self._new_arena()
        if checkpoint.state["versions"].get("kernels") is False:
            self.machine.kernels, self.machine.why = False, "the run began without them"
        for name, now in self._versions().items():
            before = checkpoint.state["versions"].get(name)
            if before != now:
                text = (
                    f"{name} was {before} when the run was saved and is {now} now: the last bits may differ"
                )
                self.emit(NoticeEvent(state.step, text))

    def _versions(self) -> dict[str, Any]:
        """What may change the last bits of the result from one part of a run to the next."""
        return {
            "torch": torch.__version__,
            "device": self.machine.device,
            "CPU threads": torch.get_num_threads(),
            "kernels": self.machine.kernels,
        }


def open_session(
    model: nn.Module,
    handle: Handle,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    folder: Path,
    emit: OnEvent,
    identity: Mapping[str, str],
    parallel: Parallel,
    beside: Session | None = None,
    longest: int = 0,
    also_trained: int = 0,
) -> Session:
    """Make the parts of a run; nothing is trained or written yet, but all processes begin with the first one's adapter.

    Several runs of one process on one base share its engine: the first is told the tokens of the ``longest`` row of
    all and how many numbers are ``also_trained`` by the others, these are opened ``beside`` it.

    Raises:
        TrainingError: the adapter cannot be trained as it is.
        DataError: no row has a trained token.
    """
    require_trainable(handle)
    rows = UsableRows(examples)
    if not rows:
        raise DataError(
            "no row has a token to train on",
            where={"rows": len(examples)},
            hint="look at the loss mask: addenda check DATA --show 3",
        )
    if rows.left_out:
        emit(NoticeEvent(0, f"{rows.left_out} rows have no token to train on and are left out"))
    load_adapter(handle, parallel.share(adapter_tensors(handle)))
    order, device = RowOrder(len(rows), config), next(handle.parameters()).device
    require_offloadable(config, device)
    flop = run_flop(model, order.passes * rows.tokens)
    engine = (
        _engine(handle, config, max(rows.longest, longest), flop, parallel, also_trained=also_trained)
        if beside is None
        else _engine_of(beside)
    )
    learning_rate = handle.method.learning_rate if config.learning_rate is None else config.learning_rate
    session = Session(
        model=model,
        handle=handle,
        packed=engine.packed,
        optimizer=_optimizer(handle, config, learning_rate),
        rows=rows,
        order=order,
        config=config,
        learning_rate=learning_rate,
        tokens_per_micro_batch=engine.tokens,
        device=device,
        folder=folder,
        identity=dict(identity),
        emit=emit,
        state=RunState(initial_sha256=digest_of_tensors(adapter_tensors(handle))),
        parallel=parallel,
        saved_at=time.monotonic(),
        machine=engine.machine,
        memory=engine.memory,
        memory_limit=engine.limit,
        offload=Offload(model, device) if engine.memory.offloaded else None,
        beside=beside,
    )
    session.identity.update(_identity(session))
    return session


class _Engine(NamedTuple):
    """What runs of one process on one base share."""

    machine: Machine
    packed: PackedModel
    memory: MemoryModel
    limit: int
    tokens: int
    """Of a micro-batch."""


def _engine(
    handle: Handle, config: TrainConfig, longest: int, flop: float, parallel: Parallel, *, also_trained: int
) -> _Engine:
    device = next(handle.parameters()).device
    machine = use_machine(wanted=config.kernels == "auto", flop=flop, device=device)
    packed = PackedModel(handle.model)
    limit = memory_limit(device, config.memory_gib, shared_by=parallel.on_this_machine)
    offload = config.offload if config.sharding == "none" else "none"
    memory = measure_memory(handle, packed, also_trained=also_trained).suited(offload, longest, limit)
    [tokens] = parallel.least(_micro_batch(memory, limit, longest, config))
    machine.keeps_memory = device.type == "cpu" and set_allocator(
        keep=config.sharding == "none"
        and memory.ledger(max(tokens, longest), keeps_memory=True).total <= limit
    )
    return _Engine(machine, packed, memory, limit, tokens)


def _engine_of(session: Session) -> _Engine:
    return _Engine(
        session.machine, session.packed, session.memory, session.memory_limit, session.tokens_per_micro_batch
    )


def _optimizer(handle: Handle, config: TrainConfig, learning_rate: float) -> torch.optim.Optimizer:
    names = {p: name for name, p in handle.named_parameters() if p.requires_grad}
    return make_optimizer(names, config, learning_rate, rate_of=lambda p: handle.rate_of(names[p]))


def _micro_batch(memory: MemoryModel, limit: int, longest: int, config: TrainConfig) -> int:
    """Tokens to run at once: as asked, or the most of which every block can keep everything.

    Raises:
        OutOfMemory: the longest row does not fit, whatever is run again.
    """
    wished = config.tokens_per_micro_batch
    choices = (wished,) if wished else token_budgets(on_gpu=memory.on_gpu)
    tokens = next((n for n in choices if memory.ledger(n).total <= limit), choices[-1])
    largest = max(tokens, longest)
    if memory.recompute_for(largest, limit) is not None:
        return tokens
    ledger, most = memory.ledger(largest, memory.blocks), memory.most_tokens(limit)
    smaller = [f"data.max_tokens={most} (longest row now {longest})"] if longest > most >= 2 else []
    smaller += [f"train.tokens_per_micro_batch={most} (now {tokens})"] if tokens > most >= 1 else []
    raise OutOfMemory(
        f"a micro-batch of {largest:,} tokens does not fit into {limit / 2**20:,.0f} MiB",
        where={"needed": str(ledger), "kept by each token": f"{memory.kept_per_token / 2**10:,.0f} KiB"},
        hint="set "
        + "; or ".join([*smaller, f"train.memory_gib={ledger.total / 2**30:.1f}", "base.dtype=bfloat16"])
        + "; or take a smaller base: 'addenda models'",
    )


def _identity(session: Session) -> dict[str, str]:
    """What a resumed run must share with the one that was begun, whatever the caller adds."""
    method = {"name": session.handle.method.name, **session.handle.method.settings()}
    return {
        **session.config.identity(),
        "base weights": fingerprint(session.model),
        "base dtype": _dtype_name(session.model),
        "method": json.dumps(method, sort_keys=True),
        "layers": hashlib.sha256("\n".join(session.handle.paths).encode()).hexdigest(),
        "adapter before training": session.state.initial_sha256,
        "training rows": session.rows.sha256,
        "packing": session.packed.path,
    }


def _dtype_name(model: nn.Module) -> str:
    frozen = [p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    return str(max(frozen, key=frozen.count, default=torch.float32)).removeprefix("torch.")


def begin(session: Session, *, resume: bool, heldout_rows: int) -> None:
    """Go to the newest checkpoint, or to the first step where there is none, and say which.

    Raises:
        ConfigError: there are checkpoints, but the run is not to be resumed.
        CheckpointError: there are checkpoints, but none can be used.
        TrainingError: another process trains something else.
    """
    session.parallel.require_same({**session.identity, "train.sharding": session.config.sharding})
    found = _newest(session, resume=resume) if session.parallel.first else Found(None, {})
    checkpoint = share_checkpoint(load_checkpoint(found.folder) if found.folder else None, session.parallel)
    if checkpoint is not None:
        session.restore(checkpoint)
        skipped = tuple(f"{set_aside(folder)}: {reason}" for folder, reason in found.skipped.items())
        session.emit(ResumeEvent(session.state.step, str(found.folder), skipped))
    session.emit(_start_event(session, resumed=checkpoint is not None, heldout_rows=heldout_rows))
    if resume and checkpoint is None:
        session.emit(
            NoticeEvent(0, f"there is no checkpoint in '{session.folder}' yet: starting from the beginning")
        )
    _say_if_some_idle(session)


def _say_if_some_idle(session: Session) -> None:
    step, processes = session.state.step, session.parallel.size
    parts = len(session.micro_batches(session.step_rows())) if step < session.order.steps else processes
    if parts < processes:
        text = (
            f"{processes} processes share {parts} micro-batch{'es' * (parts > 1)} a step, so some wait: lower "
            "train.tokens_per_micro_batch, or raise train.batch_size"
        )
        session.emit(NoticeEvent(step, text))


def _newest(session: Session, *, resume: bool) -> Found:
    sweep(session.folder)
    found = find_checkpoint(session.folder)
    if (found.folder or found.skipped) and not resume:
        raise ConfigError(
            f"'{session.folder.parent}' already holds a run",
            where={"newest checkpoint": found.folder or next(iter(found.skipped))},
            hint="resume it (--resume), or train into another folder",
        )
    if found.skipped and found.folder is None:
        raise CheckpointError(
            "no checkpoint of this run can be used",
            where={str(folder): reason for folder, reason in found.skipped.items()},
            hint=f"remove '{session.folder}' to begin anew",
        )
    return found


def _start_event(session: Session, *, resumed: bool, heldout_rows: int) -> StartEvent:
    return StartEvent(
        step=session.state.step,
        resumed=resumed,
        of_steps=session.order.steps,
        epochs=session.config.epochs,
        rows=len(session.rows),
        heldout_rows=heldout_rows,
        trainable_parameters=session.handle.trainable_parameters,
        learning_rate=session.learning_rate,
        tokens_per_micro_batch=session.tokens_per_micro_batch,
        machine=str(session.machine),
        memory=_memory_in_words(session),
        dtype=_dtype_name(session.model),
        path=session.packed.path,
        path_reason=f"{session.packed.reason}; {session.packed.parts}",
        processes=session.parallel.size,
    )


def _memory_in_words(session: Session) -> str:
    recompute = session.recompute(max(session.tokens_per_micro_batch, session.rows.longest))
    again = f", {recompute} of {session.memory.blocks} blocks run again in the backward" if recompute else ""
    again += ", activations wait in the machine's memory" if session.offload else ""
    arena = f", an arena of {session.arena.size / 2**20:,.0f} MiB among it" if session.arena.size else ""
    return f"at most {session.ledger()} of {session.memory_limit / 2**20:,.0f} MiB{arena}{again}"
