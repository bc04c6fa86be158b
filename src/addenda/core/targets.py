"""Which layers a target names: literal suffixes at a dot, every linear layer but the output head, every norm or block.

No regular expressions: a target may come from a file somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from addenda.core.host import adapter_prefixes
from addenda.core.layers import KINDS, LayerKind, kind_of, parts_of
from addenda.core.parts import Part
from addenda.errors import TargetError, nearest

__all__ = [
    "ATTENTION_OUTPUTS",
    "FEED_FORWARD_OUTPUTS",
    "KEYS_AND_VALUES",
    "Targets",
    "adaptable",
    "at",
    "bypass_of",
    "exact",
    "listed",
    "matches",
    "resolve",
    "strays",
    "suffixes_present",
    "unmatched",
    "why_unknown",
]

T = TypeVar("T")

Targets = str | Sequence[str]
"""``"all-linear"``, ``"all-norms"``, ``"all-blocks"``, one literal suffix, or several of these."""

ALL_OF_A_KIND = {"all-norms": "norm", "all-blocks": "transformer-block"}
"""Targets that name every layer of a kind."""

# Names that well-known models give to the layers with these roles; used only for the defaults of methods.
KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "attention.self.key",
    "attention.self.value",
    "key",
    "value",
    "SelfAttention.k",
    "SelfAttention.v",
    "EncDecAttention.k",
    "EncDecAttention.v",
    "k_lin",
    "v_lin",
    "attn.c_attn",
    "query_key_value",
)
ATTENTION_OUTPUTS = (
    "o_proj",
    "out_proj",
    "attention.output.dense",
    "attn.c_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
    "SelfAttention.o",
    "EncDecAttention.o",
    "out_lin",
)
FEED_FORWARD_OUTPUTS = (
    "down_proj",
    "mlp.c_proj",
    "fc2",
    "output.dense",
    "linear2",
    "DenseReluDense.wo",
    "ffn.lin2",
    "dense_4h_to_h",
)

_OF_NO_KIND: dict[type[nn.Module], str] = {
    nn.Bilinear: "its weight of three dimensions multiplies two inputs",
    nn.EmbeddingBag: "it adds up what it looks up, in a way of its own for each mode",
}

_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


def matches(path: str, suffix: str) -> bool:
    """Whether ``suffix`` names ``path``: equal to it, or to its end after a dot.

    Example:
        >>> matches("model.layers.0.self_attn.q_proj", "q_proj"), matches("model.seq_proj", "q_proj")
        (True, False)
    """
    return path == suffix or path.endswith("." + suffix)


def suffixes_present(
    paths: Sequence[str], suffixes: Iterable[str], *, without: Sequence[str] = ()
) -> list[str]:
    """Return those of ``suffixes`` that name at least one of ``paths``, without those a longer one covers.

    What a suffix of ``without`` names is left out: a suffix that names such a path too gives way to the whole paths
    of the others.

    Example:
        >>> suffixes_present(["0.output.dense", "0.attention.output.dense"], ["output.dense"])
        ['output.dense']
        >>> paths = ["0.output.dense", "0.attention.output.dense"]
        >>> suffixes_present(paths, ["output.dense"], without=["attention.output.dense"])
        ['0.output.dense']
    """
    found: list[str] = []
    kept = [path for path in paths if not any(matches(path, suffix) for suffix in without)]
    for suffix in suffixes:
        named = {p for p in kept if matches(p, suffix)}
        if named and not any(named <= {p for p in paths if matches(p, other)} for other in found):
            exact = len(named) == sum(matches(p, suffix) for p in paths)
            found += [suffix] if exact else sorted(named, key=kept.index)
    return found


def unmatched(paths: Sequence[str], suffixes: Iterable[str]) -> list[str]:
    """Return those of ``suffixes`` that name none of ``paths``.

    Example:
        >>> unmatched(["0.q_proj"], ["q_proj", "v_proj"])
        ['v_proj']
    """
    return [suffix for suffix in suffixes if not any(matches(path, suffix) for path in paths)]


def strays(paths: Sequence[str], **tables: Iterable[str]) -> list[str]:
    """Return a problem for each suffix of each table that names none of ``paths``.

    Example:
        >>> strays(["0.q_proj"], ranks={"q_proj": 4, "v_proj": 8}, alphas={})
        ["ranks names no target by 'v_proj'"]
    """
    return [
        f"{name} names no target by '{suffix}'"
        for name, table in tables.items()
        for suffix in unmatched(paths, table)
    ]


def at(path: str, table: Mapping[str, T], default: T) -> T:
    """Return what a table of suffixes says of the layer at ``path``: the last that matches counts.

    Example:
        >>> at("0.q_proj", {"q_proj": 4}, 8), at("0.k_proj", {"q_proj": 4}, 8)
        (4, 8)
    """
    found = [value for suffix, value in table.items() if matches(path, suffix)]
    return found[-1] if found else default


def adaptable(model: nn.Module) -> dict[str, tuple[nn.Module, LayerKind]]:
    """Return every layer of a known kind by its path; adapters themselves are not layers."""
    inside = adapter_prefixes(model)
    layers: dict[str, tuple[nn.Module, LayerKind]] = {}
    for path, module in model.named_modules():
        # A part is found by its owner, also where it is a module too, as the output projection of an attention.
        if path.startswith(inside) or path in layers or isinstance(module, Part):
            continue
        prefix = f"{path}." if path else ""
        found = {path: module, **{prefix + name: part for name, part in parts_of(module).items()}}
        layers.update(
            {at: (layer, kind) for at, layer in found.items() if (kind := kind_of(layer)) is not None}
        )
    return layers


def resolve(
    model: nn.Module, targets: Targets, why_not: Callable[[LayerKind], str | None]
) -> dict[str, nn.Module]:
    """Return the layers the targets name, in the model's order.

    Args:
        model: any module.
        targets: what to look for.
        why_not: tells why a layer of a kind cannot be taken; None where it can.

    Raises:
        TargetError: a target matches nothing, or only layers that cannot be adapted; all are reported at once.
    """
    every = adaptable(model)
    layers = {path: pair for path, pair in every.items() if why_not(pair[1]) is None}
    wanted = listed(targets)
    also_called = _other_names(model)
    chosen: set[str] = set()
    problems: list[str] = []
    for target in wanted:
        if target == "all-linear":
            found = _all_linear(model, layers)
        elif target in ALL_OF_A_KIND:
            found = {p for p, (_, kind) in layers.items() if kind.name == ALL_OF_A_KIND[target]}
        else:
            found = {p for p, (m, _) in layers.items() if _is_named(p, m, target, also_called)}
        bypassed = sorted(p for p in found if bypass_of(model, p, layers[p][0]))
        if target == "all-linear":
            found -= set(bypassed)
            bypassed = []
        problems += [
            f"'{p}' is read by {bypass_of(model, p, layers[p][0])} without being called" for p in bypassed
        ]
        if not found:
            kinds = [k for p, (m, k) in every.items() if _is_named(p, m, target, also_called)]
            reasons = [reason for k in kinds if (reason := why_not(k)) is not None]
            problems.append(_unmatched(model, target, reasons))
        chosen |= found
    if problems or not wanted:
        raise _error(model, layers, wanted, problems or ["no target was given"])
    return {path: module for path, (module, _) in layers.items() if path in chosen}


def _is_named(path: str, module: nn.Module, target: str, also_called: Mapping[str, list[str]]) -> bool:
    """Whether a target names the layer: by one of its paths, or a part by what it is a part of."""
    if not isinstance(module, Part):
        return any(matches(name, target) for name in (path, *also_called.get(path, ())))
    owner = path.removesuffix(module.name).removesuffix(".")
    names = module.name.split(".")
    tails = [".".join(names[:length]) for length in range(len(names) + 1)] + names[-1:]
    return any(
        matches(f"{place}.{tail}".strip("."), target)
        for place in (owner, *also_called.get(owner, ()))
        for tail in tails
    )


def listed(targets: Targets) -> list[str]:
    """Return the targets as a list.

    Raises:
        TargetError: it is no text and no list of texts.

    Example:
        >>> listed("q_proj"), listed(("q_proj", "v_proj"))
        (['q_proj'], ['q_proj', 'v_proj'])
    """
    if isinstance(targets, str):
        return [targets]
    several = isinstance(targets, Iterable) and not isinstance(targets, Mapping)
    names = list(targets) if several else []
    if not several or not all(isinstance(name, str) for name in names):
        raise TargetError(
            f"targets must be a text or a list of texts, got {targets!r}",
            hint="what differs from layer to layer is a setting of the method, such as LoRA(ranks={'v_proj': 8})",
        )
    return names


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """Return the further paths of each module that stands at several, by its first one."""
    first: dict[nn.Module, str] = {}
    others: dict[str, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(module, path) != path:
            others.setdefault(first[module], []).append(path)
    return others


def exact(
    model: nn.Module, paths: Sequence[str], why_not: Callable[[LayerKind], str | None]
) -> dict[str, nn.Module]:
    """Return the layers at exactly these paths, in the model's order.

    Raises:
        TargetError: a path is no layer, or one that cannot be taken; all are reported at once.
    """
    layers = adaptable(model)
    wrong = [path for path in paths if path not in layers or why_not(layers[path][1]) is not None]
    if wrong:
        raise _error(
            model,
            layers,
            list(paths),
            [f"'{path}' is no adaptable layer of this model" for path in wrong[:5]],
        )
    wanted = set(paths)
    return {path: module for path, (module, _) in layers.items() if path in wanted}


def bypass_of(model: nn.Module, path: str, layer: nn.Module) -> str | None:
    """Name the parent that reads the layer's weight instead of calling the layer, where no adapter can follow."""
    if isinstance(layer, Part):
        return None
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return "nn.MultiheadAttention"
    if "Mamba" in type(parent).__name__ and name == "dt_proj":
        return type(parent).__name__
    return None


def _all_linear(model: nn.Module, layers: dict[str, tuple[nn.Module, LayerKind]]) -> set[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path
        for path, (module, kind) in layers.items()
        if kind.linear and module is not head and path.rpartition(".")[2] not in _HEAD_NAMES
    }


def _unmatched(model: nn.Module, target: str, reasons: Sequence[str]) -> str:
    """Say why a target gives no layer: it names none, or only such as the reasons speak of."""
    others = [m for p, m in model.named_modules() if p and matches(p, target)]
    why = next(iter(reasons), None) or next((said for m in others if (said := why_unknown(m))), None)
    if not others and why is None:
        return f"target '{target}' matched no module"
    kind = type(others[0]).__name__ if others else None
    said = ": ".join(part for part in (kind, why) if part)
    return f"target '{target}' names only modules that this method cannot adapt ({said})"


def why_unknown(module: nn.Module) -> str | None:
    """Return why a module with a weight is of no layer kind, where that is known."""
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weight at each call"
    return next((why for kind, why in _OF_NO_KIND.items() if isinstance(module, kind)), None)


def _error(
    model: nn.Module, layers: dict[str, tuple[nn.Module, LayerKind]], wanted: list[str], problems: list[str]
) -> TargetError:
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    missing = [t for t in wanted if f"target '{t}' matched no module" in problems]
    close = [f"'{near[0]}' for '{t}'" for t in missing if (near := nearest(t, names, count=1))]
    shown = " ".join(names[:24]) or "none of a kind that can be adapted: " + " ".join(k.name for k in KINDS)
    return TargetError(
        "; ".join(problems),
        where={"model": f"{type(model).__name__}, {len(layers)} adaptable modules", "last names": shown},
        hint=f"did you mean {', '.join(close)}?"
        if close
        else "name layers by the end of their path"
        + ("" if "all-linear" in missing else ", or 'all-linear'"),
    )
