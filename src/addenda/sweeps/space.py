"""What a sweep tries: settings with their values or ranges, and the recipes that come of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from addenda.errors import AddendaError, ConfigError
from addenda.settings import Recipe, resolve
from addenda.toml import parse_value, toml_value

__all__ = ["Axis", "Choices", "Point", "Range", "Source", "grid", "parse_axes", "recipes_of", "shown"]

Point = Mapping[str, Any]
"""One choice of values: dotted keys of a recipe and what they are set to."""


@dataclass(frozen=True)
class Choices:
    """A setting with the values to try.

    Example:
        >>> str(Choices("method.rank", (4, 16)))
        'method.rank=4,16'
    """

    key: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.key}={','.join(map(toml_value, self.values))}"

    def problems(self) -> Iterator[str]:
        """Say what is wrong with it."""
        if not self.values:
            yield "no value is given"
        spelled = [toml_value(value) for value in self.values]
        for twice in sorted({value for value in spelled if spelled.count(value) > 1}):
            yield f"{twice} is given twice"


@dataclass(frozen=True)
class Range:
    """A setting with the two ends between which a search chooses; both are within, whole numbers stay whole.

    Example:
        >>> str(Range("train.learning_rate", 1e-5, 0.01, log=True))
        'train.learning_rate=1e-05..0.01:log'
    """

    key: str
    low: float
    high: float
    log: bool = False
    """Whether each power of ten is as likely as the next."""

    def __str__(self) -> str:
        return f"{self.key}={self.low!r}..{self.high!r}{':log' if self.log else ''}"

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are chosen."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def problems(self) -> Iterator[str]:
        """Say what is wrong with it."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            yield "the ends of a range must be finite"
        elif self.low >= self.high:
            yield f"the range must rise, got {self.low!r}..{self.high!r}"
        elif self.log and self.low <= 0:
            yield f"a logarithmic range must begin above 0, got {self.low!r}"


Axis = Choices | Range

_RANGE = re.compile(r"(?P<low>[^.,]+(?:\.[^.,]+)?)\.\.(?P<high>[^:,]+)(?P<log>:log)?")

_REFUSED = {
    "out": "each trial has its own folder",
    "name": "each trial has its own name",
    "base.source": "losses per token of two models with different tokens cannot be compared",
    "base.template": "another template changes what the held-out loss is measured on",
    "train.seeds": "sweep over train.seed, or train the best recipe with several seeds afterwards",
    "evals.samples": "it changes nothing that a trial is judged by",
    "evals.max_new_tokens": "it changes nothing that a trial is judged by",
}
"""Keys that no sweep may vary, and why."""


def parse_axes(texts: Sequence[str], table: Mapping[str, Any] | None = None) -> list[Axis]:
    """Read what to sweep over.

    Args:
        texts: ``KEY=VALUE,VALUE`` or, for a search, ``KEY=LOW..HIGH`` or ``KEY=LOW..HIGH:log``; values as
            for ``--set``.
        table: the same from a recipe: dotted keys, or tables of them, each with a list of values or a range as text. A
            key in ``texts`` replaces it.

    Raises:
        ConfigError: nothing to sweep over, or something that cannot be swept; all problems are named.

    Example:
        >>> [str(axis) for axis in parse_axes(["train.learning_rate=1e-4,3e-4", "method.rank=2..8"])]
        ['train.learning_rate=0.0001,0.0003', 'method.rank=2..8']
    """
    axes = {key: _axis_of(key, value) for key, value in _flat(table or {})}
    problems: dict[str, str] = {}
    seen: set[str] = set()
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            problems[text] = "--over takes section.key=value,value"
            continue
        if key in seen:
            problems[key] = "given twice: name all its values at once"
        seen.add(key)
        axes[key] = _axis(key, value)
    for key, axis in axes.items():
        found = list(axis.problems())
        if key in _REFUSED or key.startswith("data."):
            found = [_REFUSED.get(key, "it changes what the held-out loss is measured on")]
        if found:
            problems.setdefault(key, "; ".join(found))
    if not axes and not problems:
        problems["--over"] = "nothing to sweep over"
    _refuse(problems)
    return list(axes.values())


def _axis(key: str, text: str) -> Axis:
    """Read values or a range as they are typed."""
    if (found := _RANGE.fullmatch(text)) is not None:
        low, high = parse_value(found["low"]), parse_value(found["high"])
        if _is_number(low) and _is_number(high):
            return Range(key, low, high, log=bool(found["log"]))
    return Choices(key, tuple(parse_value(part) for part in _split(text)))


def _axis_of(key: str, value: object) -> Axis:
    """Read values or a range as a recipe holds them."""
    if isinstance(value, list):
        return Choices(key, tuple(value))
    return _axis(key, value) if isinstance(value, str) else Choices(key, (value,))


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _split(text: str) -> list[str]:
    """Cut at the commas that lie in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Return every combination of the values, the last setting varying fastest.

    Raises:
        ConfigError: one of them is a range.

    Example:
        >>> grid([Choices("a", (1, 2)), Choices("b", ("x",))])
        [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'x'}]
    """
    _refuse({axis.key: f"{axis} is a range" for axis in axes if isinstance(axis, Range)}, search=True)
    values = [axis.values for axis in axes if isinstance(axis, Choices)]
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


@dataclass(frozen=True)
class Source:
    """Where a recipe comes from, all but what a trial sets; as for `addenda.settings.resolve`."""

    arguments: Mapping[str, Any]

    def recipe(self, point: Point) -> Recipe:
        """Make the recipe of a trial.

        The held-out rows are those of the recipe that is swept over, whatever seed the trial has.
        """
        recipe = resolve(**self.arguments, swept=point)
        if "train.seed" in point and recipe.data.heldout_seed is None:
            unswept = {key: value for key, value in point.items() if key != "train.seed"}
            seed = resolve(**self.arguments, swept=unswept).train.seed
            recipe = recipe.derive("data.heldout_seed", seed, "the same held-out rows for every trial")
        return recipe


def recipes_of(source: Source, points: Sequence[Point]) -> list[Recipe]:
    """Make the recipes of all trials.

    Raises:
        ConfigError: unknown keys, or values that do not fit; those of all trials at once.
    """
    recipes: list[Recipe] = []
    found: dict[str, list[Point]] = {}
    for point in points:
        try:
            recipes.append(source.recipe(point))
        except AddendaError as wrong:
            text = "; ".join([wrong.message, *(f"{key}: {value}" for key, value in wrong.where.items())])
            found.setdefault(text, []).append(point)
    _refuse(
        {
            shown(at[0]) + (f" and {len(at) - 1} more" if len(at) > 1 else ""): text
            for text, at in found.items()
        }
    )
    return recipes


def shown(point: Point) -> str:
    """Return the values of a point on one line.

    Example:
        >>> shown({"method.rank": 4, "method.name": "lora"})
        'method.rank=4 method.name=lora'
    """
    return " ".join(
        f"{key}={value if isinstance(value, str) else toml_value(value)}" for key, value in point.items()
    )


def _refuse(problems: Mapping[str, str], *, search: bool = False) -> None:
    if not problems:
        return
    raise ConfigError(
        f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the sweep",
        where=problems,
        hint="a range needs --search optuna; a grid takes values: KEY=VALUE,VALUE"
        if search
        else "nothing was run; 'addenda methods NAME' and 'addenda train --dry-run' show the keys and their values",
    )
