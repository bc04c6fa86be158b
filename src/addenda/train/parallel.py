"""Several processes that train one adapter: who they are, what they tell each other, which micro-batches each one runs.

The unit is the optimiser step of the whole run. Its micro-batches are those of a single process; they are dealt out,
each process adds up the gradients of its own, and the sums are added across processes. As every loss is divided by the
trained tokens of the whole step, the result is that of one process but for the order of additions.

Messages are numbers, tensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, distributed, nn

from addenda.errors import AddendaError, ConfigError, TrainingError

__all__ = ["Parallel", "processes"]

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Parallel:
    """One process among those that train together; without arguments, the only one, and every method does nothing.

    Each method that exchanges something must be called by all processes, in the same order.

    Example:
        >>> Parallel().turns([30, 20]), Parallel().total(1.5), Parallel().agree({"step": 3})
        ([(0, 1.0), (1, 1.0)], [1.5], {'step': 3})
        >>> [Parallel(rank, 2).turns([9, 5, 4, 3]) for rank in (0, 1)]
        [[(0, 1.0), (3, 1.0)], [(1, 1.0), (2, 1.0)]]
    """

    rank: int = 0
    """Number of this process, 0 <= rank < size."""
    size: int = 1
    """How many processes there are."""
    on_this_machine: int = 1
    """How many of them share this machine's memory."""
    lockstep: bool = False
    """Whether all must run equally many micro-batches, because each pass gathers weights from all."""

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def turns(self, sizes: Sequence[int]) -> list[tuple[int, float]]:
        """Deal out micro-batches, the largest first, each to the process with the least to do.

        Args:
            sizes: tokens of each micro-batch; at least one.

        Returns:
            The indices that this process runs, ascending, each with the weight of its loss: 1, or 0 for a micro-batch
            that is run only to stay in lockstep.
        """
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            least = loads.index(min(loads))
            shares[least].append(index)
            loads[least] += sizes[index]
        mine = [(index, 1.0) for index in sorted(shares[self.rank])]
        if self.lockstep:
            smallest = min(range(len(sizes)), key=lambda i: sizes[i])
            mine += [(smallest, 0.0)] * (max(map(len, shares)) - len(mine))
        return mine

    def total(self, *values: float) -> list[float]:
        """Add up numbers over all processes, in float64."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), distributed.ReduceOp.SUM)

    def most(self, *values: int) -> list[int]:
        """Return the largest of each number over all processes."""
        return self._reduced(torch.tensor(values, dtype=torch.int64), distributed.ReduceOp.MAX)

    def least(self, *values: int) -> list[int]:
        """Return the smallest of each number over all processes."""
        return self._reduced(torch.tensor(values, dtype=torch.int64), distributed.ReduceOp.MIN)

    def _reduced(self, numbers: Tensor, operation: distributed.ReduceOp.RedOpType) -> list[Any]:
        if not self.alone:
            distributed.all_reduce(numbers, operation)
        return numbers.tolist()

    def agree(self, value: Any) -> Any:
        """Return what the first process gave; plain values that JSON holds."""
        return value if self.alone else json.loads(self._from_first(json.dumps(value).encode()))

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors, on the CPU; what the others give is not looked at."""
        return (
            dict(tensors)
            if self.alone
            else load_safetensors(self._from_first(save_safetensors(dict(tensors))))
        )

    def _from_first(self, data: bytes) -> bytes:
        [length] = self.most(len(data) if self.first else 0)
        content = torch.zeros(length, dtype=torch.uint8)
        if self.first:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        distributed.broadcast(content, src=0)
        return content.numpy().tobytes()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place; one that no process has stays None."""
        if self.alone:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            self._add_gradients(group)

    def _add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        # Everything in one message, and at its end for each parameter how many processes have a gradient.
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        having = own[0].new_tensor([float(p.grad is not None) for p in parameters])
        message = torch.cat([*(gradient.flatten() for gradient in own), having])
        distributed.all_reduce(message)
        *sums, counts = torch.split(message, [*(p.numel() for p in parameters), len(parameters)])
        for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).clone() if count else None

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place; every process gives as many, of the same shapes."""
        if not self.alone:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Check that all processes train the same run.

        Raises:
            TrainingError: something is not as in the first process; every difference is listed.
        """
        first = self.agree(dict(facts))
        differ = {
            key: f"{facts.get(key, 'absent')} in process {self.rank}, {first.get(key, 'absent')} in process 0"
            for key in sorted(facts.keys() | first.keys())
            if facts.get(key) != first.get(key)
        }
        if differ:
            raise TrainingError(
                "the processes do not train the same run",
                where=differ,
                hint="give every process the same recipe, data, base and version of addenda",
            )


@contextlib.contextmanager
def processes() -> Iterator[Parallel]:
    """Join the processes that torchrun started with this one; a lone process joins nobody.

    Used inside itself, or where torch.distributed has a default group already, it takes the group that is there.
    Numbers on the CPU travel by gloo, those on a GPU by NCCL; process n of a machine takes GPU n.

    Raises:
        ConfigError: the environment names several processes, but not this one's place among them.
        TrainingError: another process ended or cannot be reached.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield Parallel(distributed.get_rank(), distributed.get_world_size(), _on_this_machine())
        return
    rank, size = _place()
    if size == 1:
        yield Parallel()
        return
    with _losses_named():
        distributed.init_process_group(_backend(), rank=rank, world_size=size)
        try:
            yield Parallel(rank, size, _on_this_machine())
        finally:
            distributed.destroy_process_group()


def _place() -> tuple[int, int]:
    """Return rank and world size as torchrun sets them."""
    if os.environ.get("WORLD_SIZE", "1").strip() == "1":
        return 0, 1
    found = {name: os.environ.get(name, "") for name in _VARIABLES}
    numbers = {name: found[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    whole = all(text.isdecimal() for text in numbers.values()) and bool(found["MASTER_ADDR"])
    if not whole or int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise ConfigError(
            "the environment names several processes, but not this one's place among them",
            where={name: f"'{text}'" for name, text in found.items()},
            hint="start it with torchrun, which sets all four, or unset WORLD_SIZE",
        )
    return int(found["RANK"]), int(found["WORLD_SIZE"])


def _on_this_machine() -> int:
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() else 1


def _backend() -> str:
    if not distributed.is_available():
        raise ConfigError("this build of PyTorch has no torch.distributed", hint="run one process")
    local = os.environ.get("LOCAL_RANK", "0")
    if not torch.cuda.is_available() or not distributed.is_nccl_available():
        return "gloo"
    if local.isdecimal() and int(local) < torch.cuda.device_count():
        torch.cuda.set_device(int(local))
    return "cpu:gloo,cuda:nccl"


@contextlib.contextmanager
def _losses_named() -> Iterator[None]:
    """Turn a broken connection into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if isinstance(error, AddendaError) or not lost:
            raise
        raise TrainingError(
            "another process of this run ended or cannot be reached",
            where={"reason": str(error).splitlines()[0]},
            hint="its own message says why; then resume from the last checkpoint",
        ) from error
