"""The GGUF file of the base that an export goes by: what its tensors are called, ordered and packed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.gguf_header import GGUFHeader, GGUFTensor, read_header
from addenda.bases.gguf_origin import from_gguf, gguf_of
from addenda.bases.gguf_ways import Stack, Way, ways_of
from addenda.bases.packed_layers import PackedEmbedding, PackedLinear
from addenda.core.planning import Plan
from addenda.core.progress import OnProgress
from addenda.errors import ExportError
from addenda.export.ends import ends_of
from addenda.export.gguf.architectures import ARCHITECTURES
from addenda.export.gguf.copying import Changes, pack
from addenda.export.gguf.made import made_gguf, ways_by_layout, why_not_made

__all__ = [
    "Exact",
    "Origin",
    "dense",
    "file_of",
    "origin_of",
    "parted",
    "why_no_head",
    "why_no_origin",
    "why_no_place",
]

HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Origin:
    """A base's GGUF file."""

    path: Path
    header: GGUFHeader
    ways: Mapping[str, Way]
    """By the parameters' names in the model."""
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    """Tensors that hold the weights of all experts of a layer, by name."""

    @functools.cached_property
    def parameters(self) -> dict[str, str]:
        """The model's parameter of each tensor."""
        return {way.tensor: name for name, way in self.ways.items()}

    @functools.cached_property
    def tensors(self) -> dict[str, GGUFTensor]:
        """The file's tensors by name."""
        return {tensor.name: tensor for tensor in self.header.tensors}

    @functools.cached_property
    def experts(self) -> frozenset[str]:
        """Paths of the layers whose weights lie in stacks."""
        return frozenset(path for stack in self.stacks.values() for path in self.paths(stack))

    def paths(self, stack: Stack) -> list[str]:
        """Return the paths of the layers that a stack holds rows of, expert by expert."""
        return [stack.path(expert) for expert in range(self.tensors[stack.tensor].shape[0])]

    def weight(self, model: nn.Module, tensor: str) -> Tensor | None:
        """Return a tensor as numbers from the base in memory; None where the model has no parameter of it."""
        if stack := self.stacks.get(tensor):
            return model.get_parameter(stack.parameter).detach()[:, stack.rows]
        parameter = self.parameters.get(tensor)
        return None if parameter is None else self.ways[parameter].back(dense(model, parameter).float())

    def way(self, path: str, last: str = "weight") -> Way:
        """Return the way of a layer's weight or bias.

        Raises:
            ExportError: the file has no such tensor.
        """
        way = self.ways.get(f"{path}.{last}")
        if way is None:
            raise ExportError(
                f"the GGUF file of the base has no tensor for '{path}.{last}'",
                where={"architecture": self.header.architecture, "file": self.path.name},
                hint="leave the layer out of the targets; a tied output head has none either",
            )
        return way


def why_no_origin(base: LoadedBase | None) -> str:
    """Return why a base cannot be had as a GGUF file, or ""."""
    if base is None:
        return "a module that was not loaded as a base has no GGUF form"
    if base.kind != "causal-lm":
        return f"'{base.name}' is no causal language model, and llama.cpp is asked for those only"
    return "" if from_gguf(base) else why_not_made(base)


def why_no_place(planned: Plan) -> str:
    """Return which adapted layer lies otherwise in a GGUF file than this package can follow, or ""."""
    turned = next((row.path for row in planned.rows if row.kind == "conv1d-transposed"), None)
    return (
        f"the weight of '{turned}' lies transposed in a GGUF file, which adapters here do not follow"
        if turned
        else ""
    )


def why_no_head(base: LoadedBase | None) -> str:
    """Return why llama.cpp keeps no output head beside the embedding that it shares a weight with, or ""."""
    kind = str(base.model.config.model_type) if base else ""
    if kind not in ARCHITECTURES or not ARCHITECTURES[kind].taken_for_granted.get("tie_word_embeddings"):
        return ""
    return f"llama.cpp has no output head of its own for models of type '{kind}'"


def file_of(base: LoadedBase, *, on_progress: OnProgress | None = None) -> Path:
    """Return the GGUF file that a base was loaded from, or the one that is made of it.

    Raises:
        ExportError: llama.cpp runs no such model.
        NotFoundError: the file that it was loaded from is gone.
    """
    return gguf_of(base, on_progress=on_progress) or made_gguf(base, on_progress=on_progress)


def origin_of(base: LoadedBase | None, *, on_progress: OnProgress | None = None) -> Origin:
    """Return the GGUF file that a base was made from; of one that came without, the file that is made of it.

    Raises:
        ExportError: llama.cpp runs no such model.
    """
    if problem := why_no_origin(base):
        raise ExportError(problem, hint="take another format: see addenda export --help")
    assert base is not None
    path = file_of(base, on_progress=on_progress)
    if not from_gguf(base):
        return Origin(path, read_header(path), *ways_by_layout(base))
    config = base.model.config
    return _origin(path, json.dumps(config.to_dict(), sort_keys=True, default=str), _Held(config))


class _Held:
    """A value that takes no part in whether two calls are the same."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


def parted(origin: Origin, model: nn.Module) -> Origin:
    """Return the file of a model with tied ends as if it held the embedding once more, as the weight of its head."""
    ends = ends_of(model)
    if ends is None or HEAD in origin.tensors:
        return origin
    shared = origin.tensors[EMBEDDING]
    tensors = (*origin.header.tensors, replace(shared, name=HEAD))
    way = replace(origin.ways[origin.parameters[EMBEDDING]], tensor=HEAD)
    header = replace(origin.header, tensors=tensors)
    return replace(origin, header=header, ways={**origin.ways, f"{ends[1]}.weight": way})


@functools.lru_cache(maxsize=2)
def _origin(path: Path, _key: str, config: _Held) -> Origin:
    return Origin(path, read_header(path), *ways_of(path, config.value))


def dense(model: nn.Module, parameter: str) -> Tensor:
    """Return a parameter of the base as numbers, unpacked where it is packed."""
    path, _, last = parameter.rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(layer, PackedLinear | PackedEmbedding) and last == "weight":
        return layer.dequantized()
    return model.get_parameter(parameter).detach()


class Exact(Changes):
    """The base as it is in memory, in float32: what an adapter was trained on, whatever the file held."""

    def __init__(self, model: nn.Module, origin: Origin) -> None:
        self._model, self._origin = model, origin

    def type_of(self, tensor: GGUFTensor) -> str:
        return "F32"

    def rows_of(self, tensor: GGUFTensor) -> Tensor | None:
        weight = self._origin.weight(self._model, tensor.name)
        return None if weight is None else pack(weight, "F32", tensor.name)
