"""What a step takes on this machine, timed for a few seconds on a miniature of the base.

A micro-batch costs something for being one, for each token, and for each pair of tokens that see each other; so three
timings give the cost of a block, and the difference of two miniatures, of one block and of two, keeps it apart from
what stands around the blocks. Memory is counted on the same miniatures.
"""

from __future__ import annotations

import dataclasses
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
from addenda.bases.scores import chunk_bytes
from addenda.core import Handle, Plan
from addenda.core.attaching import attach_paths
from addenda.memory.arena import Arena
from addenda.train.config import TrainConfig
from addenda.train.energy import EnergyMeter
from addenda.train.evaluation import training_mode
from addenda.train.loss import packed_loss
from addenda.train.memory import BYTES_PER_TRAINED, MemoryModel, measure_memory
from addenda.train.optimizer import clip, make_optimizer

__all__ = ["Calibration", "Cost", "calibrate", "count_memory", "pairs_of"]

SHORT_ROW = 128
REPEATS = 4
CACHE = 2**26
"""Bytes, more than what most processors have of it."""

ENOUGH = 1.5
"""Seconds spent on one timing, after which it is not repeated."""

SLOW = 1.0
"""Seconds of one pass with a quarter of the tokens, from which on no more tokens are tried: rates have levelled off."""


def pairs_of(lengths: Sequence[int], window: int | None = None) -> int:
    """Return how many pairs of tokens see each other in rows of these lengths, both orders counted.

    Args:
        lengths: tokens of each row; a row of n has n x n pairs.
        window: tokens that a token sees at most, itself included; None for all.
    """
    seen = window or max(lengths, default=0)
    return sum(min(n, seen) * (2 * n - min(n, seen)) for n in lengths)


@dataclass(frozen=True)
class Cost:
    """Seconds of a part in a micro-batch, one way or both."""

    fixed: float = 0.0
    """For being one."""
    per_token: float = 0.0
    per_pair: float = 0.0
    """For each pair that `pairs_of` counts."""
    window: int | None = None
    """Tokens that a token sees at most; None for all."""

    def seconds(self, lengths: Sequence[int]) -> float:
        """Return what rows of these lengths take together.

        Example:
            >>> Cost(1.0, 0.5, 0.25).seconds([2, 4]), Cost(per_pair=1.0, window=3).seconds([2, 4])
            (9.0, 19.0)
        """
        return self.fixed + self.per_token * sum(lengths) + self.per_pair * pairs_of(lengths, self.window)

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
        config: for the optimiser.
        device: where the run will be.
        tokens: of the largest micro-batch to time.

    Raises:
        ValueError: the base has no repeated blocks, or cannot be cut down to some of them.
    """
    started, meter = time.monotonic(), EnergyMeter()
    small = _Miniatures(base, planned, torch.device(device))
    for trial in small.all:
        trial.take_times(config, tokens)
    one, two = small.one, small.two
    block, forward = two.both - one.both, two.forward - one.forward
    around, around_forward = one.both - block, one.forward - forward
    rows = [(small.count, block, forward)]
    rows += [(number, other.both - around, other.forward - around_forward) for number, other in small.others]
    if small.below:  # no gradient goes there
        rows.append((small.below, forward, Cost()))
    return Calibration(
        blocks=tuple(rows),
        around=around,
        scores=one.scores(vocabulary_of(base)),
        update=one.update * planned.parameters,
        memory=small.memory(),
        path=one.packed.path,
        reason=one.packed.reason,
        fused=small.fused(),
        unfused=tuple(dict.fromkeys(part[:2] for trial in small.all for part in trial.packed.unfused)),
        watts=meter.watts(),
        seconds=time.monotonic() - started,
    )


def count_memory(base: Any, planned: Plan) -> MemoryModel:
    """Count on miniatures what a token of a micro-batch takes on the CPU; no time is taken.

    Args:
        base: a causal model of transformers; its dense weights need not be there.
        planned: the adapters it would get.

    Raises:
        ValueError: the base has no repeated blocks, or cannot be cut down to some of them.
    """
    return _Miniatures(base, planned, torch.device("cpu")).memory()


class _Miniatures:
    """The miniatures of a base: with one block and with two of the first kind, and with one of each other kind."""

    def __init__(self, base: Any, planned: Plan, device: torch.device) -> None:
        self._base, self._planned = base, planned
        (first, self.count), *more = _kinds(base, planned).items()

        def trial(*blocks: int) -> _Trial:
            return _Trial(miniature(base, blocks), planned, device, _window(base, blocks[0]))

        self.one, self.two = trial(first), trial(first, first)
        self.others = [(number, trial(kind)) for kind, number in more]
        self.all = [self.one, self.two, *(other for _, other in self.others)]
        self.adapted = self.count + sum(number for number, _ in self.others)
        self.below = len(block_paths(base)) - self.adapted

    def whole(self, value: Callable[[_Trial], float], *, below: bool = False) -> float:
        """What the base has of something, if the miniatures have so much; blocks `below` the adapters may have none."""
        at_one, a_block = value(self.one), value(self.two) - value(self.one)
        like_first = self.count + (self.below if below else 0)
        others = sum(number * (value(other) - at_one + a_block) for number, other in self.others)
        return at_one + (like_first - 1) * a_block + others

    def memory(self) -> MemoryModel:
        """What tokens take; what the process holds is left at 0."""
        return dataclasses.replace(
            self.one.memory,
            present=0,
            trained=BYTES_PER_TRAINED * self._planned.parameters,
            kept_per_token=self.whole(lambda trial: trial.memory.kept_per_token),
            loose_per_token=self.whole(lambda trial: trial.memory.loose_per_token),
            least_per_token=self.whole(lambda trial: trial.memory.least_per_token),
            vocabulary=vocabulary_of(self._base),
            blocks=self.adapted,
        )

    def fused(self) -> tuple[tuple[str, int], ...]:
        """Kinds of fused parts, and how many there are of each."""
        counts = {kind: self.whole(_counter(kind), below=True) for kind, _ in self.one.packed.fused}
        return tuple((kind, round(count)) for kind, count in counts.items())


def _small_values(handle: Handle) -> None:
    with torch.no_grad():
        for tensor in handle.tensors().values():
            tensor.normal_(std=0.01, generator=torch.Generator(tensor.device).manual_seed(0))


class _Trial:
    """A miniature with its adapters: counted when it is made, timed when asked."""

    both: Cost
    forward: Cost
    update: float
    """Seconds of an optimiser step, for each trained number."""

    def __init__(self, small: Miniature, planned: Plan, device: torch.device, window: int | None) -> None:
        move(small.model, device)
        self._model, self._device, self._vocabulary, self._window = (
            small.model,
            device,
            small.vocabulary,
            window,
        )
        paths = [here for row in planned.rows for here in small.paths_of(row.path)]
        # What a start would compute from the weight, or from data, changes no time; computing it would.
        fill = _small_values if planned.method.needs() else None
        self._handle = attach_paths(
            small.model, planned.method, paths, name="trial", fill=fill, through=planned.through
        )
        self.packed = PackedModel(small.model)
        with training_mode(small.model, self._handle):
            self.memory = measure_memory(self._handle, self.packed)

    def take_times(self, config: TrainConfig, tokens: int) -> None:
        """Time both ways, the way forward, and the optimiser."""
        ledger = self.memory.ledger(tokens)
        arena = Arena(ledger.activations + ledger.overhead)  # as the run will have
        with training_mode(self._model, self._handle), arena.serving():
            self.both, self.forward = self._costs(tokens)
            step = _seconds_of(_stepping(self._handle, config))
        self.update = step / max(self._handle.trainable_parameters, 1)

    def scores(self, vocabulary: int) -> Cost:
        """Return the cost of the output head of a base with this vocabulary, both ways; a token is a trained one."""
        few, many = 128, 512
        states = self._states([many]).detach().requires_grad_()
        # As many rows at once as the base will score: with few the head is read often.
        chunk = max(1, chunk_bytes(on_gpu=states.is_cuda) // (vocabulary * states.element_size()))
        targets = torch.zeros(many, dtype=torch.long, device=self._device)

        def run(count: int) -> None:
            places = torch.arange(count, device=self._device)
            packed_loss(self.packed, states, places, targets[:count], denominator=1.0, chunk=chunk).backward()

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
            _solved(plans, [_seconds_of(self._both_ways, lengths) for lengths in plans], self._window),
            _solved(plans, [_seconds_of(self._forward, lengths) for lengths in plans], self._window),
        )

    def _states(self, lengths: list[int]) -> torch.Tensor:
        ids = torch.arange(sum(lengths), device=self._device) % min(self._vocabulary, 1000)
        return self.packed.hidden(ids, lengths)

    def _both_ways(self, lengths: list[int]) -> None:
        hidden = self._states(lengths)
        hidden.backward(torch.randn_like(hidden))  # small ones would meet denormal numbers, which are slow

    def _forward(self, lengths: list[int]) -> None:
        with torch.no_grad():
            self._states(lengths)


def _counter(kind: str) -> Callable[[_Trial], float]:
    """How many fused parts of a kind a miniature has."""
    return lambda trial: dict(trial.packed.fused).get(kind, 0)


def _solved(plans: Sequence[list[int]], seconds: Sequence[float], window: int | None = None) -> Cost:
    """The cost that three timings fit; with few tokens as many as many, all of it is laid on the tokens."""
    few, many, one_row = plans
    pairs = [pairs_of(lengths, window) for lengths in plans]
    per_pair = max(0.0, seconds[2] - seconds[1]) / ((pairs[2] - pairs[1]) or 1)
    short, long = (seconds[n] - per_pair * pairs[n] for n in (0, 1))
    more = sum(many) - sum(few)
    per_token = max(0.0, long - short) / more if more else long / sum(many)
    return Cost(max(0.0, long - per_token * sum(one_row)), per_token, per_pair, window)


def _window(base: Any, block: int) -> int | None:
    """Tokens that a token sees at most in a block; None for all."""
    text = base.config.get_text_config()
    window, kind = (
        getattr(text, "sliding_window", None),
        layer_kinds(base.config, len(block_paths(base)))[block],
    )
    return window if isinstance(window, int) and kind in ("", "sliding_attention") else None


def _seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """The shortest of a few calls, the first left out: what others do on the machine only adds."""
    taken: list[float] = []
    cold = torch.zeros(CACHE // 4)
    while len(taken) <= REPEATS and (len(taken) < 2 or sum(taken) < ENOUGH):
        cold.add_(
            1
        )  # the other blocks of the base would have thrown the weights of this one out of the cache
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
        frozenset(row.path[len(path) :] for row in planned.rows if f"{row.path}.".startswith(f"{path}."))
        for path in paths
    ]
    inside = sum(map(len, adapted))
    first = next((i for i, layers in enumerate(adapted) if layers), 0) if inside == len(planned.rows) else 0
    kinds = list(zip(layer_kinds(base.config, len(paths)), adapted, strict=True))[first:]
    counts = Counter(kinds)
    return {first + kinds.index(kind): count for kind, count in counts.items()}
