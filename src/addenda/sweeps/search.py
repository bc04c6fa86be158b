"""How a sweep comes by its points: all of a grid at once, or some at a time as Optuna chooses them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from addenda.errors import MissingDependencyError
from addenda.sweeps.space import Axis, Choices, Point, Range, grid, shown

__all__ = ["Grid", "OptunaSearch", "Search"]

TRIALS = 20
"""Of a search for which no number is given."""

ASKED_IN_VAIN = 10
"""How many times as often as there are trials Optuna is asked, as it may choose again what was tried already."""

CORNERS = 64
"""Most combinations of the ends of ranges and of values that are looked at before a search begins."""


class Search(Protocol):
    """Something that says what to try next."""

    total: int
    """How many points it will give at most."""

    def samples(self) -> list[Point]:
        """Return points that show what the sweep may ask of a machine: all of them, or those at the ends."""

    def ask(self) -> list[Point]:
        """Return the points to run next; none when it is over."""

    def tell(self, losses: Sequence[float | None]) -> None:
        """Take the losses of the points that were asked for last, None for one that failed."""


class Grid:
    """Every combination.

    Raises:
        ConfigError: a setting is given as a range.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self._points = grid(axes)
        self._asked = False
        self.total = len(self._points)

    def samples(self) -> list[Point]:
        """All points."""
        return self._points

    def ask(self) -> list[Point]:
        """All points, once."""
        found = [] if self._asked else self._points
        self._asked = True
        return found

    def tell(self, losses: Sequence[float | None]) -> None:
        """Nothing follows from them."""


class OptunaSearch:
    """Points chosen by Optuna's tree-structured Parzen estimator, several at a time.

    The same losses lead to the same points, so a search that goes on is told again what is known. Numbers of ranges
    have three digits, so that a recipe stays readable.

    Args:
        axes: values or ranges; values are taken as unordered.
        trials: how many points; None for `TRIALS`.
        at_once: how many are chosen before the losses of the last ones are known.
        seed: of the choice.

    Raises:
        MissingDependencyError: Optuna is not installed.

    References: Bergstra et al. 2011 (NeurIPS 24); Akiba et al. 2019 (arXiv:1907.10902).
    """

    def __init__(self, axes: Sequence[Axis], *, trials: int | None, at_once: int, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise MissingDependencyError(
                "this search needs the package 'optuna'", hint="pip install 'addenda[sweep]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._axes = axes
        self._at_once = at_once
        self._known: dict[str, float | None] = {}
        self._pending: list[tuple[Any, Point]] = []
        self.total = TRIALS if trials is None else trials
        self._may_ask = ASKED_IN_VAIN * self.total

    def samples(self) -> list[Point]:
        """The ends of the ranges and all values, in every combination, up to `CORNERS`."""
        ends = [
            Choices(axis.key, (axis.low, axis.high)) if isinstance(axis, Range) else axis
            for axis in self._axes
        ]
        # Each end of each setting occurs even where not every combination does.
        singly = [
            {axis.key: axis.values[step % len(axis.values)] for axis in ends}
            for step in range(max(len(axis.values) for axis in ends))
        ]
        values = itertools.product(*(axis.values for axis in ends))
        every = (dict(zip([axis.key for axis in ends], chosen, strict=True)) for chosen in values)
        return list({shown(point): point for point in [*singly, *itertools.islice(every, CORNERS)]}.values())

    def ask(self) -> list[Point]:
        """The next points, none of which was given before; fewer where Optuna finds no new ones."""
        self._pending = []
        wanted = min(self._at_once, self.total - len(self._known))
        while len(self._pending) < wanted and self._may_ask > 0:
            self._may_ask -= 1
            trial = self._study.ask()
            point = {axis.key: _suggest(trial, axis) for axis in self._axes}
            if shown(point) in self._known:
                self._tell(trial, self._known[shown(point)])
            else:
                self._known[shown(point)] = None
                self._pending.append((trial, point))
        return [point for _, point in self._pending]

    def tell(self, losses: Sequence[float | None]) -> None:
        """Tell Optuna the losses of the last points."""
        for (trial, point), loss in zip(self._pending, losses, strict=True):
            self._known[shown(point)] = loss
            self._tell(trial, loss)

    def _tell(self, trial: Any, loss: float | None) -> None:
        if loss is None:
            self._study.tell(trial, state=self._failed)
        else:
            self._study.tell(trial, loss)


def _suggest(trial: Any, axis: Axis) -> Any:
    """Return the value of a setting that Optuna chooses."""
    if isinstance(axis, Choices):
        # By place: Optuna takes no lists.
        return axis.values[trial.suggest_categorical(axis.key, list(range(len(axis.values))))]
    if axis.whole:
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
    chosen = float(f"{trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log):.3g}")
    return min(max(chosen, float(axis.low)), float(axis.high))
