"""A miniature: a few blocks of a causal model at their true width, so that a machine can be timed on it.

A block of a model takes the same time and keeps the same memory wherever it stands, so two blocks tell of eighty, and
need a fortieth of the memory. The numbers in the weights are noise; packed weights are the base's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from addenda.bases.empty import empty_model
from addenda.bases.fast.recompute import find_blocks
from addenda.bases.packed_layers import PackedEmbedding, PackedLinear, packed_layers

__all__ = ["Miniature", "block_paths", "layer_kinds", "miniature"]

VOCABULARY = 16_384
"""Rows of a miniature's dense embedding at most: a look-up takes the same time in any table."""

SPREAD = 0.02
"""Standard deviation of the weights, as most models begin with."""


@dataclass(frozen=True)
class Miniature:
    """A model of few blocks, and where its modules stand in the base."""

    model: nn.Module
    """Runs like the base, with real weights."""
    places: tuple[tuple[str, str], ...]
    """Path of a block in the base, and in the miniature; in the miniature's order."""
    vocabulary: int
    """Rows of its output head."""

    def paths_of(self, path: str) -> list[str]:
        """Return where a layer of the base stands here: nowhere if its block is left out, twice if that came twice."""
        folder = self.places[0][0].rpartition(".")[0]
        if not path.startswith(f"{folder}."):
            return [path]
        return [
            here + path[len(there) :] for there, here in self.places if f"{path}.".startswith(f"{there}.")
        ]


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the repeated blocks of a model, in order.

    Example:
        >>> block_paths(nn.Sequential(nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])))
        ('0.0', '0.1')
    """
    names = {module: path for path, module in model.named_modules()}
    return tuple(names[block] for block in find_blocks(model))


def layer_kinds(config: Any, depth: int) -> tuple[str, ...]:
    """Return each block's kind of attention, such as ``sliding_attention``; "" where the config says nothing."""
    kinds = getattr(config.get_text_config(), "layer_types", None)
    return tuple(kinds) if isinstance(kinds, list) and len(kinds) == depth else ("",) * depth


def miniature(base: Any, blocks: Sequence[int]) -> Miniature:
    """Build a causal model of a base's blocks.

    Args:
        base: a causal model of transformers; its dense weights need not be there.
        blocks: which of its blocks, in their order; one may be taken twice.

    Raises:
        ValueError: the base has no repeated blocks, or its config cannot be cut down to some of them.
    """
    from transformers import AutoModelForCausalLM

    paths = block_paths(base)
    if not paths:
        raise ValueError("the model has no repeated blocks")
    folder = paths[0].rpartition(".")[0]
    packed = packed_layers(base)
    whole_table = any(isinstance(layer, PackedEmbedding) for layer in packed.values())
    config = _cut(base.config, blocks, depth=len(paths), vocabulary=None if whole_table else VOCABULARY)
    model = empty_model(AutoModelForCausalLM, config, base.dtype)
    here = block_paths(model)
    if here != tuple(f"{folder}.{place}" for place in range(len(blocks))):
        raise ValueError("the config does not say how many blocks the model has")
    sources = {f"{folder}.{place}": paths[block] for place, block in enumerate(blocks)}
    for path in [path for path, _ in model.named_modules()]:
        block = next((there for there in sources if path.startswith(f"{there}.")), None)
        source = packed.get(sources[block] + path[len(block) :] if block else path)
        if source is not None:
            model.set_submodule(path, _filled(source))
    _give_weights(model)
    places = tuple((paths[block], f"{folder}.{place}") for place, block in enumerate(blocks))
    return Miniature(model, places, config.get_text_config().vocab_size)


def _cut(config: Any, blocks: Sequence[int], *, depth: int, vocabulary: int | None) -> Any:
    """A config of fewer blocks: every list with an entry for each block loses those of the others."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    lists = {
        key: [value[block] for block in blocks]
        for key, value in vars(text).items()
        if isinstance(value, list) and len(value) == depth
    }
    text.num_hidden_layers = len(blocks)
    for key, value in lists.items():
        setattr(text, key, value)
    if vocabulary is not None and text.vocab_size > vocabulary:
        text.vocab_size = vocabulary
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, key, None)
    return cut


def _filled(layer: PackedLinear | PackedEmbedding) -> PackedLinear | PackedEmbedding:
    """A packed layer on the base's own rows; on packed noise where those are not there."""
    raw = layer.raw
    if raw.is_meta:  # only layers that are packed at the load come without their rows
        quantize = layer.weight_format.quantize
        assert quantize is not None
        raw = quantize(torch.empty(len(raw), layer.width).normal_(0.0, SPREAD))
    if isinstance(layer, PackedLinear):
        return PackedLinear(raw, layer.weight_format, layer.width, layer.bias, layer.compute_dtype)
    return PackedEmbedding(raw, layer.weight_format, layer.width, layer.scale, layer.compute_dtype)


def _give_weights(model: nn.Module) -> None:
    noise = torch.Generator().manual_seed(0)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                values = torch.ones(parameter.shape, dtype=parameter.dtype)
                if parameter.dim() > 1:
                    values.normal_(0.0, SPREAD, generator=noise)
                made[parameter] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[parameter]
