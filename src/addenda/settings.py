"""A run as data: the recipe, where each of its values came from, and its TOML form.

One schema, three spellings: dataclasses in Python, TOML on disk, ``--set section.key=value`` on the command line.
The method's own fields and the training settings are read from their classes, so a new method needs nothing here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from addenda.core import registry
from addenda.errors import ConfigError, nearest
from addenda.export.names import format_names
from addenda.toml import parse_value, read_recipe_file, toml_value
from addenda.train.config import TrainConfig

if TYPE_CHECKING:
    from addenda.core.contract import Method

__all__ = [
    "BaseSettings",
    "DataSettings",
    "EvalSettings",
    "Origin",
    "Recipe",
    "given_values",
    "resolve",
    "resolve_input",
]


@dataclass(frozen=True)
class BaseSettings:
    """Which model is adapted, and how it is held."""

    source: str = "smollm2-135m-instruct"
    """A name from ``addenda models``, a model folder, a .gguf file, or a hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the frozen weights; unset: what this machine multiplies fastest."""
    weights: Literal["auto", "dense", "packed", "nf4", "int8"] = "auto"
    """Whether a GGUF file's weights stay as they are packed (``packed``) or are unpacked into memory (``dense``);
    ``auto``: dense where they leave half of the available memory. ``nf4`` and ``int8`` pack the linear layers of any
    model when it is loaded."""
    template: str | None = None
    """What replaces the model's chat template: ``plain``, or a Jinja file."""
    device: str = "auto"
    """Where it runs: ``cpu``, ``cuda``, or ``cuda:N`` for one of several GPUs; ``auto``: ``cuda`` where there is a GPU
    that PyTorch can use, else ``cpu``."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ConfigError(
                f"device must be auto, cpu, cuda or cuda:N, got '{self.device}'",
                hint="set it in the section 'base'",
            )


@dataclass(frozen=True)
class DataSettings:
    """What is trained on, and what is held out."""

    path: str = ""
    """A file, a folder with train and valid files, or ``-`` for standard input."""
    valid: str | None = None
    """A file of held-out rows; unset: rows are held out of ``path``."""
    shape: str | None = None
    """The shape of the rows (chat, sharegpt, alpaca, prompt-completion, vertex, text); unset: found out."""
    prompt: str | None = None
    """Column that holds the prompt, where the file has columns of its own."""
    completion: str | None = None
    """Column that holds the answer to train on."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are predicted: every assistant turn, the last one only, or everything."""
    max_tokens: int | None = None
    """Longest row in tokens; unset: what the base can attend to, at most 2048."""
    overflow: Literal["drop", "cut"] = "drop"
    """What happens to longer rows."""
    heldout_fraction: float = 0.1
    """Share of the rows held out, in (0, 0.5]."""
    heldout_minimum: int = 20
    """Fewest rows held out."""
    heldout_seed: int | None = None
    """Seed of the choice of held-out rows, >= 0; unset: train.seed."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens is not None and self.max_tokens < 2:
            problems.append(f"max_tokens must be at least 2, got {self.max_tokens}")
        if not 0 < self.heldout_fraction <= 0.5:
            problems.append(f"heldout_fraction must be in (0, 0.5], got {self.heldout_fraction}")
        if self.heldout_minimum < 1:
            problems.append(f"heldout_minimum must be at least 1, got {self.heldout_minimum}")
        if self.heldout_seed is not None and self.heldout_seed < 0:
            problems.append(f"heldout_seed must be at least 0, got {self.heldout_seed}")
        if (self.prompt is None) != (self.completion is None):
            problems.append("prompt and completion name two columns: give both or neither")
        if problems:
            raise ConfigError("; ".join(problems), hint="set them in the section 'data'")


@dataclass(frozen=True)
class EvalSettings:
    """What the report shows beside the figures."""

    samples: int = 5
    """Held-out prompts answered before and after."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        if self.samples < 0 or self.max_new_tokens < 1:
            raise ConfigError(
                "samples must be at least 0 and max_new_tokens at least 1",
                hint="set them in the section 'evals'",
            )


_SECTIONS: dict[str, type[Any]] = {
    "base": BaseSettings,
    "data": DataSettings,
    "train": TrainConfig,
    "evals": EvalSettings,
}


@dataclass(frozen=True)
class Origin:
    """Where a value came from: ``default``, ``file``, ``--set``, ``flag``, ``sweep`` or ``derived``."""

    kind: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.note}" if self.note else self.kind


@dataclass(frozen=True)
class Recipe:
    """A complete run as data.

    Example:
        >>> recipe = resolve(flags={"data.path": "rows.jsonl"}, sets=["method.rank=4"])
        >>> recipe.method.rank, str(recipe.origin("method.rank")), str(recipe.origin("train.epochs"))
        (4, '--set', 'default')
    """

    base: BaseSettings
    data: DataSettings
    method: Method
    targets: str | tuple[str, ...] | None
    train: TrainConfig
    evals: EvalSettings
    name: str
    """Name of the adapter on its model."""
    out: str | None
    """The run folder; unset: ``runs/DATA-METHOD``."""
    origins: Mapping[str, Origin] = field(default_factory=dict, compare=False)
    """Where each value that is no default came from."""

    def origin(self, key: str) -> Origin:
        """Where the value of ``key`` (dotted) came from."""
        return self.origins.get(key, Origin("default"))

    def derive(self, key: str, value: Any, reason: str) -> Recipe:
        """Return the recipe with ``key`` (dotted) set because of ``reason``.

        A value that was chosen by the user is never derived over; callers test it first.
        """
        section, _, name = key.rpartition(".")
        origins = {**self.origins, key: Origin("derived", reason)}
        if not section or key == "method.targets":
            changes: dict[str, Any] = {name: value, "origins": origins}
            return dataclasses.replace(self, **changes)
        changed = dataclasses.replace(getattr(self, section), **{name: value})
        changes = {section: changed, "origins": origins}
        return dataclasses.replace(self, **changes)

    def values(self) -> dict[str, Any]:
        """Every key, dotted, with its value, in the order of the TOML file."""
        found: dict[str, Any] = {"name": self.name, "out": self.out}
        for section in ("base", "data"):
            found.update(_prefixed(section, vars(getattr(self, section))))
        found.update({"method.name": self.method.name, "method.targets": self.targets})
        found.update(_prefixed("method", self.method.settings()))
        for section in ("train", "evals"):
            found.update(_prefixed(section, vars(getattr(self, section))))
        return found

    def to_toml(self) -> str:
        """The recipe as TOML, each value with its origin as a comment; `resolve` reads it back."""
        lines: list[str] = []
        section = ""
        for key, value in self.values().items():
            table, _, name = key.rpartition(".")
            if table != section:
                section = table
                lines += ["", f"[{table}]"]
            origin = self.origin(key)
            if value is None:
                lines.append(f"# {name} is unset  ({origin})")
            else:
                lines.append(f"{name} = {toml_value(value)}  # {origin}")
        return "\n".join(lines) + "\n"

    def document(self) -> dict[str, dict[str, object]]:
        """The recipe as JSON: ``{key: {"value", "origin"}}`` with dotted keys."""
        return {
            key: {"value": value, "origin": str(self.origin(key))} for key, value in self.values().items()
        }


def resolve(
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    swept: Mapping[str, object] | None = None,
) -> Recipe:
    """Build a recipe from a TOML file, ``--set`` assignments, flags and what a sweep tries; later ones win.

    Args:
        file: a recipe, such as ``recipe.resolved.toml`` of another run.
        sets: ``section.key=value`` with the value spelled as in TOML (bare words are text).
        flags: dotted keys and values; None values are left out.
        swept: dotted keys and values of one trial of a sweep; the file may then hold a table ``[sweep]``.

    Raises:
        ConfigError: unknown keys, values of a wrong type or out of range; all of them at once.
        NotFoundError: the file does not exist.

    Example:
        >>> resolve(sets=["train.epochs=1", "method.name=ia3"]).method.name
        'ia3'
    """
    given, problems = _given(file, sets, flags)
    if swept is not None:
        given = {key: found for key, found in given.items() if not key.startswith("sweep.")}
        given.update({key: (value, Origin("sweep")) for key, value in swept.items()})
    method_type = registry.get(str(given.get("method.name", ("lora", None))[0]))
    values = _conformed(given, {**_schema(), **_method_schema(method_type)}, problems)
    origins = {key: origin for key, (_, origin) in given.items()}
    return _build(values, origins, method_type, problems)


def given_values(
    *, file: Path | None = None, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Return the values that were given, by dotted key, unchecked; arguments as for `resolve`.

    Raises:
        ConfigError: what is no assignment.
        NotFoundError: the file does not exist.

    Example:
        >>> given_values(sets=["train.epochs=1"], flags={"method.name": None})
        {'train.epochs': 1}
    """
    given, problems = _given(file, sets, flags)
    if problems:
        _refuse(problems)
    return {key: value for key, (value, _) in given.items() if not key.startswith("sweep.")}


def resolve_input(
    *, file: Path | None = None, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> tuple[BaseSettings, DataSettings]:
    """Return a recipe's base and data alone; arguments and errors as for `resolve`.

    The method is looked at only where the recipe names one, so that reading data does not have to load the methods.

    Example:
        >>> resolve_input(flags={"data.path": "rows.jsonl"})[1].path
        'rows.jsonl'
    """
    given, problems = _given(file, sets, flags)
    values = _conformed(given, _schema(), problems)
    if problems or any(key.startswith("method.") for key in given):
        recipe = resolve(file=file, sets=sets, flags=flags)
        return recipe.base, recipe.data
    built = _sections(values, problems)
    if problems:
        _refuse(problems)
    return built["base"], built["data"]


def _given(
    file: Path | None, sets: Sequence[str], flags: Mapping[str, object] | None
) -> tuple[dict[str, tuple[Any, Origin]], dict[str, str]]:
    """Return each key that was given, with its value and origin, and what could not be read."""
    given: dict[str, tuple[Any, Origin]] = {}
    problems: dict[str, str] = {}
    if file is not None:
        given.update(
            {key: (value, Origin("file", str(file))) for key, value in _flat(read_recipe_file(file))}
        )
    given.update({key: (value, Origin("--set")) for key, value in _assignments(sets, problems).items()})
    given.update({k: (v, Origin("flag")) for k, v in (flags or {}).items() if v is not None})
    return given, problems


def _conformed(
    given: Mapping[str, tuple[Any, Origin]], schema: Mapping[str, Any], problems: dict[str, str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, (value, origin) in given.items():
        if key not in schema:
            problems[key] = _unknown(key, schema, origin)
            continue
        try:
            values[key] = _conform(value, schema[key])
        except _Unfit as wrong:
            problems[key] = f"{wrong}, got {toml_value(value)} ({origin})"
    return values


def _build(
    values: Mapping[str, Any], origins: dict[str, Origin], method_type: type[Method], problems: dict[str, str]
) -> Recipe:
    chosen = _section(values, "method")
    built = _sections(values, problems)
    with _named(problems, "method"):
        built["method"] = method_type(**{k: v for k, v in chosen.items() if k not in ("name", "targets")})
    if problems:
        _refuse(problems)
    if built["train"].learning_rate is None:
        rate = built["method"].usual_rate()
        built["train"] = dataclasses.replace(built["train"], learning_rate=rate)
        origins["train.learning_rate"] = Origin("derived", f"suits {method_type.name}")
    chosen = {
        "targets": values.get("method.targets"),
        "name": values.get("name", "default"),
        "out": values.get("out"),
    }
    return Recipe(**built, **chosen, origins=origins)


def _sections(values: Mapping[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    """Make every section but the method's."""
    built: dict[str, Any] = {}
    for section, make in _SECTIONS.items():
        with _named(problems, section):
            built[section] = make(**_section(values, section))
    if "train" in built and (unknown := [n for n in built["train"].export_to if n not in format_names()]):
        known = ", ".join(format_names())
        problems["train.export_to"] = f"no export format '{unknown[0]}'; there are {known}"
    return built


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {key.partition(".")[2]: v for key, v in values.items() if key.startswith(f"{section}.")}


@contextlib.contextmanager
def _named(problems: dict[str, str], section: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as wrong:
        problems[section] = wrong.message


def _refuse(problems: Mapping[str, str]) -> typing.NoReturn:
    if len(problems) == 1:
        [(key, text)] = problems.items()
        raise ConfigError(
            f"{key}: {text}", hint="'addenda train --help' names the sections, 'addenda methods' the methods"
        )
    raise ConfigError(
        f"{len(problems)} problems in the recipe",
        where=problems,
        hint="nothing was run; put these right and run again",
    )


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _assignments(sets: Sequence[str], problems: dict[str, str]) -> dict[str, Any]:
    found = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems[text] = "--set takes section.key=value"
            continue
        found[key.strip()] = parse_value(value)
    return found


def _schema() -> dict[str, Any]:
    """Every key but the method's own, with its type."""
    found: dict[str, Any] = {"name": str, "out": str}
    for section, owner in _SECTIONS.items():
        found.update(_fields(section, owner))
    return found


def _method_schema(method_type: type[Method]) -> dict[str, Any]:
    return {
        "method.name": str,
        "method.targets": str | tuple[str, ...],
        **_fields("method", method_type),
    }


def _fields(section: str, owner: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(owner)
    return {f"{section}.{f.name}": hints[f.name] for f in dataclasses.fields(owner)}


def _unknown(key: str, schema: Mapping[str, Any], origin: Origin) -> str:
    near = nearest(key, schema, count=1)
    if not near:
        near = [name for name in schema if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    section = key.partition(".")[0]
    if section == "sweep":
        return f"only 'addenda sweep' reads the table [sweep] ({origin})"
    known = [name for name in schema if name.startswith(f"{section}.")]
    if near:
        return f"unknown key ({origin}); did you mean '{near[0]}'?"
    if known:
        return f"unknown key ({origin}); known: {' '.join(known)}"
    sections = dict.fromkeys(name.partition(".")[0] for name in schema)
    return f"unknown key ({origin}); sections and keys at the top: {' '.join(sections)}"


class _Unfit(Exception):
    """A value is not of the kind its key asks for; the text says which kind that is."""


def _conform(value: Any, hint: Any) -> Any:
    """Return ``value`` as ``hint`` asks, or raise `_Unfit` saying what it must be."""
    shape, inner = typing.get_origin(hint), typing.get_args(hint)
    if shape in (typing.Union, types.UnionType):
        return _conform_any(value, inner)
    if shape is Literal:
        if value in inner:
            return value
        raise _Unfit("must be " + " or ".join(f"'{name}'" for name in inner))
    if shape is tuple and isinstance(value, (list, tuple)):
        return tuple(_conform(item, inner[0]) for item in value)
    if shape is not None and issubclass(shape, Mapping) and isinstance(value, Mapping):
        return {str(key): _conform(item, inner[1]) for key, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _Unfit(f"must be {_kind(hint)}")


def _conform_any(value: Any, hints: Sequence[Any]) -> Any:
    reasons = []
    for hint in hints:
        try:
            return _conform(value, hint)
        except _Unfit as wrong:
            if hint is not type(None):
                reasons.append(str(wrong).removeprefix("must be "))
    raise _Unfit("must be " + " or ".join(reasons))


def _kind(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
    return names.get(typing.get_origin(hint) or hint, "a table")


def _prefixed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.items()}
