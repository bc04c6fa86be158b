"""What a step takes on this machine, timed for a few seconds on a miniature of the base.

A micro-batch costs something for being one, for each token, and for each pair of tokens that see each other; so three
timings give the cost of a block, and the difference of two miniatures, of one block and of two, keeps it apart from
what stands around the blocks. Memory is counted on the same miniatures.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from addenda.bases.loaded import vocabulary_of
from addenda.bases.miniature import Miniature, block_paths, layer_kinds, miniature
from addenda.bases.packed import PackedModel
from addenda.bases.place import move
from addenda.core import Handle, Plan
from addenda.core.attaching import attach_paths
from addenda.train.config import TrainConfig
from addenda.train.energy import EnergyMeter
from addenda.train.evaluation import training_mode
from addenda.train.loss import packed_loss
from addenda.train.memory import MemoryModel, measure_memory
from addenda.train.optimizer import clip, make_optimizer

__all__ = ["Calibration", "Cost", "calibrate"]

SHORT_ROW = 128
REPEATS = 4
ENOUGH = 1.5
"""Seconds spent on one timing, after which it is not repeated."""

SLOW = 1.0
"""Seconds of one pass with a quarter of the tokens, from which on no more tokens are tried: rates have levelled off."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a part in a micro-batch, one way or both."""

    fixed: float = 0.0
    """For being one."""
    per_token: float = 0.0
    per_pair: float = 0.0
    """For each token that a token sees, itself and what comes later counted as well: a row of n has n x n pairs."""
    window: int | None = None
    """Tokens that a token sees at most; None for all."""

    def seconds(self, lengths: Sequence[int]) -> float:
        """Return what rows of these lengths take together.

        Example:
            >>> Cost(1.0, 0.5, 0.25).seconds([2, 4]), Cost(per_pair=1.0, window=3).seconds([2, 4])
            (9.0, 19.0)
        """
        window = self.window or max(lengths, default=0)
        pairs = sum(min(n, window) * (2 * n - min(n, window)) for n in lengths)
        return self.fixed + self.per_token * sum(lengths) + self.per_pair * pairs

    def __sub__(self, other: Cost) -> Cost:
        """The cost of what is left without ``other``; nothing costs less than nothing."""
        return Cost(
            max(0.0, self.fixed - other.fixed),
            max(0.0, self.per_token - other.per_token),
            max(0.0, self.per_pair - other.per_pair),
            self.window,
        )


@dataclass(frozen=True)
class Calibration:
    """What micro-batches of one base, method and machine take."""

    blocks: tuple[tuple[int, Cost, Cost], ...]
    """For each kind of block: how many there are, the cost of both ways, and of the way forward alone."""
    around: Cost
    """Both ways through what stands around the blocks."""
    scores: Cost
    """Both ways through the output head; a token is a trained one."""
    update: float
    """Seconds of an optimiser step."""
    memory: MemoryModel
    """``present`` is left at 0: only the caller knows what the process will hold."""
    path: str
    """As in `PackedModel`; so are the next three."""
    reason: str
    fused: tuple[tuple[str, int], ...]
    unfused: tuple[tuple[str, str], ...]
    """Kinds of parts that run as they are, and why."""
    watts: float | None
    """What the processor drew meanwhile, where the machine tells."""
    seconds: float
    """What the calibration took."""

    def micro_batch(self, lengths: Sequence[int], trained: int, recompute: int = 0) -> float:
        """Return the seconds of a micro-batch.

        Args:
            lengths: tokens of its rows.
            trained: its trained tokens.
            recompute: blocks that run again.
        """
        depth = sum(count for count, _, _ in self.blocks)
        again = recompute / depth if depth else 0.0
        blocks = sum(
            count * (both.seconds(lengths) + again * forward.seconds(lengths))
            for count, both, forward in self.blocks
        )
        return blocks + self.around.seconds(lengths) + self.scores.seconds([trained])

    def evaluation(self, lengths: Sequence[int], trained: int) -> float:
        """Return the seconds of a micro-batch without gradient; scores without one take about a third."""
        blocks = sum(count * forward.seconds(lengths) for count, _, forward in self.blocks)
        return blocks + (self.around.seconds(lengths) + self.scores.seconds([trained])) / 3


def calibrate(
    base: Any,
    planned: Plan,
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
    tokens: int = 1024,
) -> Calibration:
    """Time and count on miniatures of a base.

    Args:
        base: a causal model of transformers; its dense weights need not be there.
        planned: the adapters it would get.
        config: for the optimiser and the threads.
        device: where the run will be.
        tokens: of the largest micro-batch to time.

    Raises:
        ValueError: the base has no repeated blocks, or cannot be cut down to some of them.
    """
    started, meter = time.monotonic(), EnergyMeter()
    (first, count), *more = _kinds(base, planned).items()

    def trial(*blocks: int) -> _Trial:
        return _Trial(miniature(base, blocks), planned, config, torch.device(device), tokens)

    one, two = trial(first), trial(first, first)
    others = [(number, trial(kind)) for kind, number in more]
    trials = [one, *(other for _, other in others)]
    block, forward = two.both - one.both, two.forward - one.forward
    around, around_forward = one.both - block, one.forward - forward
    rows = [(count, block, forward)]
    rows += [(number, other.both - around, other.forward - around_forward) for number, other in others]
    adapted = sum(number for number, _, _ in rows)
    below = len(block_paths(base)) - adapted
    if below:  # no gradient goes there
        rows.append((below, forward, Cost()))

    def whole(value: Callable[[_Trial], float], like_first: int = count) -> float:
        """What the base has of something, if the miniatures have so much."""
        at_one, a_block = value(one), value(two) - value(one)
        return (
            at_one
            + (like_first - 1) * a_block
            + sum(n * (value(other) - at_one + a_block) for n, other in others)
        )

    return Calibration(
        blocks=tuple(rows),
        around=around,
        scores=one.scores(vocabulary_of(base)),
        update=one.update * planned.parameters,
        memory=MemoryModel(
            present=0,
            trained=16 * planned.parameters,
            kept_per_token=whole(lambda trial: trial.memory.kept_per_token),
            least_per_token=whole(lambda trial: trial.memory.least_per_token),
            vocabulary=vocabulary_of(base),
            blocks=adapted,
            on_gpu=one.memory.on_gpu,
        ),
        path=one.packed.path,
        reason=one.packed.reason,
        fused=tuple((kind, round(whole(_counter(kind), count + below))) for kind, _ in one.packed.fused),
        unfused=tuple(dict.fromkeys(part[:2] for other in trials for part in other.packed.unfused)),
        watts=meter.watts(),
        seconds=time.monotonic() - started,
    )


class _Trial:
    """A miniature with its adapters, timed and counted."""

    def __init__(
        self, small: Miniature, planned: Plan, config: TrainConfig, device: torch.device, tokens: int
    ) -> None:
        move(small.model, device)
        self._device, self._vocabulary = device, small.vocabulary
        paths = [here for row in planned.rows for here in small.paths_of(row.path)]
        handle = attach_paths(small.model, planned.method, paths, name="trial")
        self.packed = PackedModel(small.model)
        with training_mode(small.model, handle):
            self.memory = measure_memory(handle, self.packed)
            self.both, self.forward = self._costs(tokens)
            self.update = _seconds_of(_stepping(handle, config)) / max(handle.trainable_parameters, 1)

    def scores(self, vocabulary: int) -> Cost:
        """Return the cost of the output head, both ways, for each trained token."""
        few, many = 128, 512
        states = self._states([many]).detach().requires_grad_()
        targets = torch.zeros(many, dtype=torch.long, device=self._device)

        def run(count: int) -> None:
            places = torch.arange(count, device=self._device)
            packed_loss(self.packed, states, places, targets[:count], denominator=1.0).backward()

        short, long = (_seconds_of(run, count) for count in (few, many))
        per_token = max(0.0, long - short) / (many - few)
        wider = vocabulary / self._vocabulary
        return Cost(max(0.0, short - few * per_token), per_token * wider)

    def _costs(self, tokens: int) -> tuple[Cost, Cost]:
        """Three passes, few tokens, many in short rows, many in one row: so many unknowns."""
        few = [SHORT_ROW] * max(1, tokens // 4 // SHORT_ROW)
        self._both_ways(few)
        started = time.monotonic()
        self._both_ways(few)
        many = few * (4 if time.monotonic() - started < SLOW else 1)
        plans = (few, many, [sum(many)])
        return (
            _solved(plans, [_seconds_of(self._both_ways, lengths) for lengths in plans]),
            _solved(plans, [_seconds_of(self._forward, lengths) for lengths in plans]),
        )

    def _states(self, lengths: list[int]) -> torch.Tensor:
        ids = torch.arange(sum(lengths), device=self._device) % min(self._vocabulary, 1000)
        return self.packed.hidden(ids, lengths)

    def _both_ways(self, lengths: list[int]) -> None:
        hidden = self._states(lengths)
        hidden.backward(torch.full_like(hidden, 1e-3))

    def _forward(self, lengths: list[int]) -> None:
        with torch.no_grad():
            self._states(lengths)


def _counter(kind: str) -> Callable[[_Trial], float]:
    """How many fused parts of a kind a miniature has."""
    return lambda trial: dict(trial.packed.fused).get(kind, 0)


def _solved(plans: Sequence[list[int]], seconds: Sequence[float]) -> Cost:
    """The cost that three timings fit; with few tokens as many as many, all of it is laid on the tokens."""
    few, many, one_row = plans
    pairs = (sum(many) ** 2 - SHORT_ROW**2 * len(many)) or 1
    per_pair = max(0.0, seconds[2] - seconds[1]) / pairs
    short, long = (
        s - per_pair * SHORT_ROW**2 * len(rows) for s, rows in zip(seconds, (few, many), strict=False)
    )
    more = sum(many) - sum(few)
    per_token = max(0.0, long - short) / more if more else long / sum(many)
    return Cost(max(0.0, long - per_token * sum(one_row)), per_token, per_pair)


def _seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """The shortest of a few calls, the first left out: what others do on the machine only adds."""
    taken: list[float] = []
    while len(taken) <= REPEATS and (len(taken) < 2 or sum(taken) < ENOUGH):
        started = time.perf_counter()
        function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _stepping(handle: Handle, config: TrainConfig) -> Callable[[], None]:
    parameters = [p for p in handle.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config, 1e-6)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        clip(parameters, config.clip_norm)
        optimizer.step()

    return step


def _kinds(base: Any, planned: Plan) -> dict[int, int]:
    """For the first block of each kind, how many there are of it; those below the first adapted one left out.

    Blocks are of one kind if their attention is, and if the same of their layers are adapted.
    """
    paths = block_paths(base)
    adapted = [
        frozenset(row.path[len(path) :] for row in planned.rows if row.path.startswith(f"{path}."))
        for path in paths
    ]
    inside = sum(map(len, adapted))
    first = next((i for i, layers in enumerate(adapted) if layers), 0) if inside == len(planned.rows) else 0
    kinds = list(zip(layer_kinds(base.config, len(paths)), adapted, strict=True))[first:]
    counts = Counter(kinds)
    return {first + kinds.index(kind): count for kind, count in counts.items()}
