"""The state of a run between two steps: what a checkpoint must hold so that a resumed run ends with the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from addenda.core.handle import Handle
from addenda.errors import CheckpointError

__all__ = [
    "RunState",
    "adapter_tensors",
    "digest_of_tensors",
    "load_adapter",
    "load_optimizer",
    "optimizer_tensors",
    "require_same_run",
    "seed_generators",
]

RECENT_LOSSES = 5
"""Losses that are watched together for divergence."""


@dataclass
class RunState:
    """Where a run stands; everything in it is plain data."""

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Tokens seen, context included."""
    trained_tokens: int = 0
    """Prediction targets seen."""
    seconds: float = 0.0
    """Time spent so far, over all resumed parts."""
    step_seconds: float = 0.0
    """Time spent in optimiser steps alone, without evaluations and checkpoints."""
    first_loss: float = 0.0
    """Loss of the first step."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last few steps, oldest first."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """``step``, ``epoch``, ``metrics`` and ``best`` of each evaluation."""
    best_step: int | None = None
    best_nll: float | None = None
    without_gain: int = 0
    """Evaluations in a row that were not better than the best."""
    stopped_early: bool = False
    finished: bool = False
    initial_sha256: str = ""
    """Hash of the adapter before the first step."""

    @property
    def evaluated(self) -> bool:
        """Whether the adapter has been evaluated as it is now."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def enter_step(self, loss: float, *, tokens: int, trained_tokens: int, seconds: float) -> None:
        """Count one optimiser step."""
        self.step += 1
        self.tokens += tokens
        self.trained_tokens += trained_tokens
        self.step_seconds += seconds
        self.first_loss = loss if self.step == 1 else self.first_loss
        self.recent_losses = [*self.recent_losses, loss][-RECENT_LOSSES:]

    def document(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, values: Mapping[str, Any]) -> RunState:
        """Make it from plain values.

        Raises:
            CheckpointError: one is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            raise CheckpointError(
                "the checkpoint's state does not have the parts it must have",
                where={"differ": " ".join(sorted(names ^ set(values)))},
                hint="it was written by another version of addenda; train anew",
            )
        return cls(**values)


def adapter_tensors(handle: Handle) -> dict[str, Tensor]:
    """Return copies on the CPU of all the adapter's parameters and buffers, as ``<layer path>.<name>``."""
    return {name: value.detach().to("cpu", copy=True) for name, value in handle.tensors().items()}


def load_adapter(handle: Handle, tensors: Mapping[str, Tensor]) -> None:
    """Write values back into the adapter, in place.

    Raises:
        CheckpointError: names or shapes are not the adapter's.
    """
    live = handle.tensors()
    _require_names(set(live), set(tensors), "adapter")
    for name, value in live.items():
        _require_shape(value, tensors[name], name)
        with torch.no_grad():
            value.copy_(tensors[name])


_SHAPED = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""The optimiser's averages, in PyTorch's words and in bitsandbytes'; they have the parameter's shape."""


def optimizer_tensors(handle: Handle, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors, as ``<layer path>.<parameter>.<slot>``; not copied."""
    return {
        f"{name}.{slot}": torch.as_tensor(value)
        for name, parameter in handle.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(handle: Handle, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put values written by :func:`optimizer_tensors` back.

    Raises:
        CheckpointError: a name or a shape is not one of the adapter's parameters.
    """
    parameters = dict(handle.named_parameters())
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition(".")
        _require_names({name} & set(parameters), {name}, "optimizer")
        if value.ndim and slot in _SHAPED:
            _require_shape(parameters[name], value, key)
        by_parameter.setdefault(name, {})[slot] = value
    for name, slots in by_parameter.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            k: _step_count(v, parameter, optimizer) if k == "step" else v.clone().to(parameter.device)
            for k, v in slots.items()
        }


def _step_count(value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor | int:
    """Return the count as the optimiser keeps it: beside the parameter for a fused update, else on the CPU."""
    if not isinstance(optimizer, torch.optim.AdamW):  # bitsandbytes counts in Python
        return int(value)
    return value.clone().to(parameter.device if optimizer.defaults["fused"] else torch.device("cpu"))


def _require_names(expected: set[str], found: set[str], what: str) -> None:
    if expected != found:
        example = sorted(expected ^ found)[0]
        raise CheckpointError(
            f"the checkpoint's {what} tensors are not those of this adapter",
            where={"differ": len(expected ^ found), "for example": example},
            hint="attach the same method to the same targets as before",
        )


def _require_shape(expected: Tensor, found: Tensor, name: str) -> None:
    if expected.shape != found.shape:
        raise CheckpointError(
            f"'{name}' has shape {tuple(found.shape)} in the checkpoint, {tuple(expected.shape)} now",
            hint="attach the same method, with the same rank, as before",
        )


def seed_generators(seed: int, *place: object) -> None:
    """Set PyTorch's generators to a state that depends on ``seed`` and ``place`` alone.

    Done before each micro-batch, dropout is the same whichever process runs it, and a resumed run needs no state.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same_run(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that a resumed run is the one that was begun.

    Raises:
        CheckpointError: something differs; every difference is listed.
    """
    changed = {
        key: f"{before.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if changed:
        raise CheckpointError(
            f"this is not the run that the checkpoint belongs to: {len(changed)} difference{'s' * (len(changed) > 1)}",
            where=changed,
            hint="resume with the recipe and the data of that run, or train into another folder",
        )
