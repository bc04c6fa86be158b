"""Packing: examples laid end to end in micro-batches, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from addenda.data.rows import Example, RowRef
from addenda.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["PackedBatch", "collate", "epoch_order", "plan_batches", "plan_steps"]


@dataclass(frozen=True)
class PackedBatch:
    """Several examples in one row, for a model that keeps them apart by ``lengths``."""

    input_ids: torch.Tensor
    """(T,) long: the token ids of all examples, one after the other."""
    lengths: tuple[int, ...]
    """Tokens of each example; they sum to T."""
    predict_from: torch.Tensor
    """(N,) long: positions in the packed row whose hidden state predicts the target of the same index."""
    targets: torch.Tensor
    """(N,) long: the token ids to predict. None crosses from one example to the next."""
    rows: tuple[RowRef, ...]
    """Where each example came from."""
    prompts: tuple[int, ...] | None = None
    """Tokens of each example before its first trained one; None where that is not known."""

    @property
    def tokens(self) -> int:
        """T, the number of tokens the model runs over."""
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        """N, the number of tokens the loss is a mean over."""
        return len(self.targets)


def collate(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end.

    Example:
        >>> batch = collate([Example((7, 8, 9), (False, False, True), RowRef("a", 1, 0))] * 2)
        >>> batch.input_ids.tolist(), batch.predict_from.tolist(), batch.targets.tolist(), batch.lengths
        ([7, 8, 9, 7, 8, 9], [1, 4], [9, 9], (3, 3))
    """
    import torch

    ids: list[int] = []
    predict_from: list[int] = []
    for example in examples:
        start = len(ids) - 1  # the hidden state one place earlier predicts a token
        predict_from += [start + i for i, on in enumerate(example.trained) if on and i > 0]
        ids += example.input_ids
    input_ids = torch.tensor(ids, dtype=torch.long)
    positions = torch.tensor(predict_from, dtype=torch.long)
    return PackedBatch(
        input_ids,
        tuple(len(example) for example in examples),
        positions,
        input_ids[positions + 1],
        tuple(example.row for example in examples),
        tuple(next((i for i, on in enumerate(each.trained) if on), len(each)) for each in examples),
    )


def plan_batches(
    lengths: Sequence[int], *, tokens_per_batch: int, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Divide examples into micro-batches of at most ``tokens_per_batch`` tokens, first fit, longest first.

    Args:
        lengths: tokens of each example.
        tokens_per_batch: budget of a micro-batch, at least 1. An example longer than that is alone in its batch.
        order: the examples to divide, as indices into ``lengths``; None is all of them.

    Returns:
        Indices into ``lengths``; each example once. The result depends only on the arguments.

    Example:
        >>> plan_batches([5, 3, 4, 2, 9], tokens_per_batch=7)
        [[4], [0, 3], [2, 1]]
    """
    if tokens_per_batch < 1:
        raise ConfigError(
            f"tokens_per_batch must be at least 1, got {tokens_per_batch}", hint="2048 is usual"
        )
    chosen = range(len(lengths)) if order is None else order
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(chosen, key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            batches.append([index])
            room.append(tokens_per_batch - lengths[index])
        else:
            batches[place].append(index)
            room[place] -= lengths[index]
    return batches


def plan_steps(
    lengths: Sequence[int], *, sequences_per_step: int, tokens_per_batch: int, seed: int, epoch: int
) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of each optimiser step of one epoch; the last step may be smaller.

    Which examples a step holds depends on (seed, epoch, number of examples) alone, so a run can go on at any step.

    Example:
        >>> steps = list(plan_steps([4] * 5, sequences_per_step=2, tokens_per_batch=8, seed=0, epoch=0))
        >>> [sum(len(batch) for batch in step) for step in steps]
        [2, 2, 1]
    """
    if sequences_per_step < 1:
        raise ConfigError(
            f"sequences_per_step must be at least 1, got {sequences_per_step}", hint="16 is usual"
        )
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)
    for start in range(0, len(order), sequences_per_step):
        chosen = order[start : start + sequences_per_step]
        yield plan_batches(lengths, tokens_per_batch=tokens_per_batch, order=chosen)


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """Return the order in which examples are seen: a shuffle that depends on (count, seed, epoch) alone.

    The numbers come from SplitMix64 (Steele, Lea and Flood 2014), written out here so that no library's
    release changes the order of a run.

    Example:
        >>> epoch_order(6, seed=0, epoch=0) == epoch_order(6, seed=0, epoch=0) != epoch_order(6, seed=0, epoch=1)
        True
    """
    import numpy as np

    start: NDArray[np.uint64] = _mix(np.array([seed], dtype=np.int64).astype(np.uint64)) ^ np.uint64(epoch)
    places: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
    keys = _mix(np.add(_mix(start), places, dtype=np.uint64))
    return [int(i) for i in np.argsort(keys, kind="stable")]


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 on an array of uint64, which wraps around."""
    import numpy as np

    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
