"""Which layers a target names: literal suffixes at a dot, or every linear layer but the output head.

No regular expressions: a target may come from a file somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from addenda.core.layers import KINDS, LayerKind, kind_of
from addenda.errors import TargetError, nearest

__all__ = [
    "ATTENTION_OUTPUTS",
    "FEED_FORWARD_OUTPUTS",
    "KEYS_AND_VALUES",
    "Targets",
    "adaptable",
    "bypass_of",
    "exact",
    "matches",
    "resolve",
    "suffixes_present",
]

Targets = str | Sequence[str]
"""``"all-linear"``, one literal suffix, or several."""

# Names that well-known models give to the layers with these roles; used only for the defaults of methods.
KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "attention.self.key",
    "attention.self.value",
    "key",
    "value",
    "attn.c_attn",
)
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "attention.output.dense", "attn.c_proj", "self_attn.dense")
FEED_FORWARD_OUTPUTS = ("down_proj", "mlp.c_proj", "fc2", "output.dense", "linear2")

_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


def matches(path: str, suffix: str) -> bool:
    """Whether ``suffix`` names ``path``: equal to it, or to its end after a dot.

    Example:
        >>> matches("model.layers.0.self_attn.q_proj", "q_proj"), matches("model.seq_proj", "q_proj")
        (True, False)
    """
    return path == suffix or path.endswith("." + suffix)


def suffixes_present(paths: Sequence[str], suffixes: Iterable[str]) -> list[str]:
    """Return those of ``suffixes`` that name at least one of ``paths``, without those a longer one covers."""
    found: list[str] = []
    for suffix in suffixes:
        named = {p for p in paths if matches(p, suffix)}
        if named and not any(named <= {p for p in paths if matches(p, other)} for other in found):
            found.append(suffix)
    return found


def adaptable(model: nn.Module) -> dict[str, tuple[nn.Module, LayerKind]]:
    """Return every layer of a known kind by its path; adapters themselves are not layers."""
    inside = tuple(f"{path}.adapters." for path, m in model.named_modules() if hasattr(m, "_addenda"))
    return {
        path: (module, kind)
        for path, module in model.named_modules()
        if not path.startswith(inside) and (kind := kind_of(module)) is not None
    }


def resolve(model: nn.Module, targets: Targets, *, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers the targets name, in the model's order.

    Raises:
        TargetError: a target matches nothing, or only layers that cannot be adapted; all are reported at once.
    """
    layers = {path: pair for path, pair in adaptable(model).items() if pair[1].name in kinds}
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    problems: list[str] = []
    for target in wanted:
        found = (
            _all_linear(model, layers)
            if target == "all-linear"
            else {p for p in layers if matches(p, target)}
        )
        bypassed = sorted(p for p in found if bypass_of(model, p))
        if target == "all-linear":
            found -= set(bypassed)
            bypassed = []
        problems += [f"'{p}' is read by {bypass_of(model, p)} without being called" for p in bypassed]
        if not found:
            problems.append(_unmatched(model, target))
        chosen |= found
    if problems or not wanted:
        raise _error(model, layers, wanted, problems or ["no target was given"])
    return {path: module for path, (module, _) in layers.items() if path in chosen}


def exact(model: nn.Module, paths: Sequence[str], *, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers at exactly these paths, in the model's order.

    Raises:
        TargetError: a path is not a layer of one of the kinds; all are reported at once.
    """
    layers = adaptable(model)
    wrong = [path for path in paths if path not in layers or layers[path][1].name not in kinds]
    if wrong:
        raise _error(
            model,
            layers,
            list(paths),
            [f"'{path}' is no adaptable layer of this model" for path in wrong[:5]],
        )
    wanted = set(paths)
    return {path: module for path, (module, _) in layers.items() if path in wanted}


def bypass_of(model: nn.Module, path: str) -> str | None:
    """Name the parent that reads the layer's weight instead of calling the layer, where that is known."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return "nn.MultiheadAttention"
    return None


def _all_linear(model: nn.Module, layers: dict[str, tuple[nn.Module, LayerKind]]) -> set[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path
        for path, (module, kind) in layers.items()
        if kind.linear and module is not head and path.rpartition(".")[2] not in _HEAD_NAMES
    }


def _unmatched(model: nn.Module, target: str) -> str:
    others = [type(m).__name__ for p, m in model.named_modules() if p and matches(p, target)]
    if others:
        return f"target '{target}' names only modules that this method cannot adapt ({others[0]})"
    return f"target '{target}' matched no module"


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
        else "name layers by the end of their path, or 'all-linear'",
    )
