"""The plan: what an attach would do, worked out without touching the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from addenda.core.building import build_adapters
from addenda.core.contract import Method
from addenda.core.handle import handles
from addenda.core.host import adapter_prefixes, require_module
from addenda.core.layers import view_of
from addenda.core.merging import tied
from addenda.core.mixing import paths_of_all, require_mixable
from addenda.core.packed_layers import packed_numel
from addenda.core.parts import Part
from addenda.core.targets import Targets, adaptable, bypass_of, listed, resolve, why_unknown
from addenda.core.through import Rounding, require_roundable, rounding_of, train_through
from addenda.core.views import LayerView
from addenda.core.whole import exact_layers, is_whole, whole_layers, whole_problems
from addenda.errors import MethodError, TargetError

__all__ = ["Plan", "PlannedLayer", "plan", "require_possible"]


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that would get an adapter."""

    path: str
    kind: str
    weight_shape: tuple[int, int]
    """(d_out, d_in) of the base layer's weight as a matrix."""
    parameters: int
    """Trainable numbers the adapter adds, without those that it shares."""
    bytes: int
    """Size of what it adds in memory, frozen tensors too."""
    low_rank: bool = False
    """Whether all that the adapter does is to add a product of two thin factors."""


@dataclass(frozen=True)
class Plan:
    """What would be adapted, how many parameters that trains, and what is left out and why.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> print(addenda.plan(model, addenda.LoRA(rank=2), targets=["0"]))
        lora on 1 layers: 24 trainable parameters (52.17% of 46), 0.0 MiB
             1 x 0                linear                   8 -> 4               24 each
    """

    method: Method
    rows: tuple[PlannedLayer, ...]
    base_parameters: int
    notes: tuple[str, ...] = ()
    shared_parameters: int = 0
    """Trainable numbers that the layers share."""
    shared_bytes: int = 0
    """Size of what they share in memory, frozen tensors too."""
    through: str | None = None
    """The packed format through which it is to be trained."""

    @property
    def parameters(self) -> int:
        """Trainable numbers in all."""
        return self.shared_parameters + sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Size of the adapters' tensors in memory."""
        return self.shared_bytes + sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        share = 100 * self.parameters / max(1, self.base_parameters)
        head = f"{self.method.name} on {len(self.rows)} layers: {self.parameters:,} trainable parameters"
        head += f" ({share:.2f}% of {self.base_parameters:,}), {self.bytes / 2**20:.1f} MiB"
        head += f", through {self.through}" if self.through else ""
        groups = Counter(
            (r.path.rpartition(".")[2], r.kind, r.weight_shape[1], r.weight_shape[0], r.parameters)
            for r in self.rows
        )
        lines = [
            f"  {count:>4} x {name:<16} {kind:<18} {d_in:>7,} -> {d_out:<7,} {each:>10,} each"
            for (name, kind, d_in, d_out, each), count in groups.items()
        ]
        if self.shared_bytes:
            lines.append(f"  shared by all of them: {self.shared_parameters:,} trainable parameters")
        return "\n".join([head, *lines, *(f"  note: {note}" for note in self.notes)])


def plan(
    model: nn.Module, method: Method, targets: Targets | None = None, *, through: str | None = None
) -> Plan:
    """Return what ``attach`` with the same arguments would do; the model is only read.

    Args:
        model: any module.
        method: the method with its settings.
        targets: as for :func:`addenda.attach`.
        through: likewise.

    Raises:
        TargetError: a target matches nothing, or something that cannot be adapted.
        MethodError: the method cannot stand on one of the layers, or cannot be trained through the format; all of
            them are reported.
        NotFoundError: there is no such format.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> addenda.plan(model, addenda.LoRA(rank=2), targets="all-linear").parameters
        36
    """
    require_module(model)
    if not isinstance(method, Method):
        raise MethodError(
            f"a method is an object such as LoRA(rank=16), not {method!r}",
            hint="make one of the classes that 'addenda methods' lists, with its settings",
        )
    require_mixable(handles(model), method)
    wanted = default_targets(model, method) if targets is None else targets
    why_not, whole = (lambda kind: kind.why_not(method)), whole_layers(model, method)
    named = targets is not None or not method.mixes()
    targeted = resolve(model, wanted, why_not) if named else exact_layers(model, method, list(wanted))
    layers = {p: m for p, (m, _) in adaptable(model).items() if p in targeted or p in whole}
    views = _possible_views(method, layers, whole_problems(model, method))
    rounding = None if through is None else rounding_of(through)
    if rounding is not None:
        require_roundable(model, method, views, rounding)
    rows, shared = _planned(method, views, rounding)
    notes = _left_out(model, method) if "all-linear" in listed(wanted) else _uneven(list(targeted))
    notes += [
        f"'{path}' shares its weight with '{other}', which goes on with the weight as it is"
        for path, other in tied(model, views).items()
    ]
    if (
        targets is None
        and wanted == "all-linear"
        and type(method).default_targets is not Method.default_targets
    ):
        notes.insert(0, f"no layer has a name that {method.name} goes by: all linear layers instead")
    return Plan(
        method,
        rows,
        _base_parameters(model),
        tuple(notes[:20]),
        *shared,
        None if rounding is None else rounding.name,
    )


def require_possible(method: Method, layers: Mapping[str, nn.Module]) -> dict[str, LayerView]:
    """Refuse layers on which the method cannot stand; return the others as it sees them.

    Raises:
        MethodError: the method cannot stand on one of them; all problems are reported.
    """
    return _possible_views(method, layers)


def _possible_views(
    method: Method, layers: Mapping[str, nn.Module], problems: Sequence[str] = ()
) -> dict[str, LayerView]:
    meta = torch.device("meta")
    views = {path: view_of(module, path, parameter_device=meta) for path, module in layers.items()}
    _require_possible(method, list(views.values()), problems)
    return views


def default_targets(model: nn.Module, method: Method) -> Targets:
    """Return the method's own choice of targets for this model.

    Raises:
        TargetError: it has nothing to choose from.
    """
    if method.mixes():
        return paths_of_all(handles(model), method)
    layers = {path: kind for path, (_, kind) in adaptable(model).items()}
    chosen = method.default_targets([path for path, kind in layers.items() if kind.why_not(method) is None])
    if not chosen:
        there = list(dict.fromkeys(kind.name for kind in layers.values()))
        raise TargetError(
            f"method '{method.name}' finds nothing in a {type(model).__name__} that it could adapt",
            where={
                "it adapts": " ".join(method.layer_kinds()),
                "the model has": " ".join(there) or "none of all kinds",
            },
            hint="choose a method that adapts what the model has; 'addenda methods' lists them",
        )
    return chosen


def _require_possible(method: Method, views: Sequence[LayerView], problems: Sequence[str]) -> None:
    by_problem: dict[str, list[str]] = {}
    tried: dict[object, list[str]] = {}
    for view in views:
        if view.form not in tried:  # one of each class stands for all of it: a trial runs the layer
            tried[view.form] = view.problems()
        dropping = view.folded and bool(getattr(method, "dropout", False))
        unseen = (
            ["dropout needs the layer's input, which is not seen where a weight is only read"]
            if dropping
            else []
        )
        own = [] if is_whole(method, view.path) else unseen + method.problems_at(view)
        for problem in tried[view.form] + own:
            by_problem.setdefault(problem, []).append(view.path)
    paths = [view.path for view in views]
    lines = [*problems, *(f"{problem} at {_some(places)}" for problem, places in by_problem.items())]
    lines += method.problems_among([path for path in paths if not is_whole(method, path)])
    if lines:
        last_names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        raise MethodError(
            "; ".join(lines),
            where={"method": method.name, "layers": len(views), "last names": " ".join(last_names[:24])},
            hint=f"change the setting, or leave these layers out of the targets; 'addenda methods {method.name}'",
        )


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"'{paths[0]}'{more}"


def _planned(
    method: Method, views: Mapping[str, LayerView], rounding: Rounding | None
) -> tuple[tuple[PlannedLayer, ...], tuple[int, int]]:
    """Return the row of each layer, and the parameters and bytes of what all share."""
    adapters = build_adapters(method, views)
    if rounding is not None:
        for adapter in adapters.values():
            train_through(adapter, rounding)
    shared = next((adapter.common for adapter in adapters.values() if adapter.common is not None), None)
    rows = tuple(
        PlannedLayer(
            view.path,
            view.kind,
            (view.d_out, view.d_in),
            *_size(adapters[path], without=shared),
            low_rank=adapters[path].eval().low_rank_term() is not None,
        )
        for path, view in views.items()
    )
    return rows, (0, 0) if shared is None else _size(shared)


def _size(made: nn.Module, *, without: nn.Module | None = None) -> tuple[int, int]:
    """Trainable numbers, and bytes with the frozen tensors that are kept."""
    shared = set() if without is None else {id(t) for t in without.state_dict(keep_vars=True).values()}
    own = [t for t in made.state_dict(keep_vars=True).values() if id(t) not in shared]
    trained = sum(t.numel() for t in own if isinstance(t, nn.Parameter))
    return trained, sum(t.numel() * t.element_size() for t in own)


def _base_parameters(model: nn.Module) -> int:
    inside = adapter_prefixes(model)
    stored = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    others = [m for m, kind in adaptable(model).values() if kind.name == "quantized-linear"]
    return stored + packed_numel(model) + sum(_not_stored(m) for m in others)


def _not_stored(layer: Any) -> int:
    """How many more weights a layer stands for than its parameter has numbers: a code may hold several."""
    weight = layer._parameters.get("weight")
    return int(layer.in_features * layer.out_features) - (0 if weight is None else weight.numel())


def _left_out(model: nn.Module, method: Method) -> list[str]:
    """Return a note for each reason why 'all-linear' leaves something out."""
    layers = adaptable(model)
    linear = {path: kind for path, (_, kind) in layers.items() if kind.linear}
    notes = [
        f"'{path}' is left out: {parent} reads its weight without calling it"
        for path in linear
        if (parent := bypass_of(model, path, layers[path][0]))
    ]
    whys = {path: why for path, kind in linear.items() if (why := kind.why_not(method))}
    whys |= {path: why for path, module in model.named_modules() if (why := why_unknown(module))}
    for why, count in Counter(whys.values()).items():
        first = next(path for path in whys if whys[path] == why)
        notes.append(f"{count} left out, such as '{first}': {why}")
    known = {_owner(path, layer) for path, (layer, _) in layers.items()} | whys.keys()
    stacked = [n for n, p in model.named_parameters() if p.dim() == 3 and n.rpartition(".")[0] not in known]
    if stacked:
        notes.append(
            f"{len(stacked)} stacked 3-D weights, such as '{stacked[0]}', are of no known kind: left out"
        )
    return notes


def _owner(path: str, layer: nn.Module) -> str:
    """Return the path of the module that a layer's parameters belong to."""
    return path.removesuffix(layer.name).removesuffix(".") if isinstance(layer, Part) else path


def _uneven(paths: list[str]) -> list[str]:
    """Return a note where the targets are found in different numbers of layers."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    if len(set(counts.values())) < 2:
        return []
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"the targets are found in different numbers of layers: {found}"]
