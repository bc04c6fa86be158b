"""The optimiser's parameter groups, the learning rate of each step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from addenda.errors import MissingDependencyError
from addenda.train.config import TrainConfig

__all__ = ["clip", "learning_rate_factor", "make_optimizer", "set_learning_rate", "warmup_steps"]

FEWEST_WARMUP_STEPS = 3


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    learning_rate: float,
    *,
    rate_of: Callable[[nn.Parameter], float] = lambda _: 1.0,
) -> torch.optim.Optimizer:
    """Make AdamW over the adapter's parameters; vectors (biases, scales) are in groups without weight decay.

    Args:
        parameters: what is trained.
        config: betas, weight decay, and which optimiser.
        learning_rate: of a parameter whose rate is 1.
        rate_of: factor on the learning rate of a parameter; those of a rate are in groups of their own.

    Raises:
        MissingDependencyError: 8 bits were asked for, and bitsandbytes is not installed.
    """
    every = list(parameters)
    by_kind: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in every:
        by_kind.setdefault((rate_of(parameter), parameter.ndim < 2), []).append(parameter)
    groups = [
        {
            "params": by_kind[kind],
            "weight_decay": 0.0 if kind[1] else config.weight_decay,
            "rate": kind[0],
            "lr": learning_rate * kind[0],
        }
        for kind in sorted(by_kind)
    ]
    options: dict[str, Any] = {"lr": learning_rate, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "adamw8bit":
        made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(groups, **options)
        return made
    # The fused update reads and writes each number once, where the plain one makes five passes over memory.
    fused = all(p.device.type in ("cpu", "cuda") for p in every)
    return torch.optim.AdamW(groups, **options, fused=fused or None)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependencyError(
            "the optimizer 'adamw8bit' needs 'bitsandbytes', which is not installed",
            hint="pip install 'addenda[quantized]', or set train.optimizer to 'adamw'",
        ) from error
    return bitsandbytes


def warmup_steps(total: int, fraction: float) -> int:
    """Return over how many steps the learning rate rises.

    Example:
        >>> warmup_steps(1000, 0.03), warmup_steps(20, 0.03), warmup_steps(4, 0.03), warmup_steps(20, 0.0)
        (30, 3, 2, 0)
    """
    if fraction == 0.0:
        return 0
    return min(max(math.ceil(fraction * total), FEWEST_WARMUP_STEPS), total // 2)


def learning_rate_factor(step: int, *, total: int, warmup: int, schedule: str, floor: float = 0.0) -> float:
    """Return the share of the peak learning rate at optimiser step ``step``, counted from 1 to ``total``.

    It rises linearly to 1 at step ``warmup``, then falls so that ``floor`` would be reached one step after the last:
    no step is spent at a learning rate of zero.

    Example:
        >>> [learning_rate_factor(s, total=5, warmup=2, schedule="linear") for s in range(1, 6)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - max(warmup, 1)) / (total + 1 - max(warmup, 1))
    fall = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return floor + (1.0 - floor) * fall


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group, by its rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most ``limit``; return the norm before, a scalar.

    A non-finite norm is returned as it is and changes nothing.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if limit is not None and bool(norm.isfinite()):
        nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    return norm
