"""A small transformer of a base's own make beside it, and the blocks of the base along which its states travel.

The states ride through the base behind the features of each block's output, so that whoever runs blocks again in the
backward has them among the block's inputs. A mirror's attention keeps its keys and values in the base's own cache, in
layers behind the base's, so that whoever chooses or repeats the rows of that cache does so for both.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from addenda.core.blocks import is_transformer_block
from addenda.core.contract import Base
from addenda.core.host import adapter_prefixes
from addenda.core.sequence import Inject, Inputs, Update
from addenda.core.starts import jointly
from addenda.errors import MethodError

__all__ = ["along", "blocks_of", "make_mirror", "mirrored", "with_room"]

_PLACES = "_addenda_mirrors"
"""Where a cache keeps the place of each mirror's layers among its own."""
_PASSED_ON = ("attention_mask", "position_ids", "segments", "past_key_values", "token_type_ids")


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer, in order, and none that an adapter holds."""
    inside = adapter_prefixes(transformer)
    named = transformer.named_modules()
    return [module for path, module in named if is_transformer_block(module) and not path.startswith(inside)]


def make_mirror(transformer: Any, layers: int, base: Base) -> nn.Module:
    """Make a transformer of the same class and sizes with ``layers`` blocks, which is called with embeddings.

    Args:
        transformer: the base's.
        layers: how many blocks.
        base: makes the parameters; their first values are those that the class itself draws.
    """
    config = copy.deepcopy(transformer.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 1, None
    config.use_cache = False  # it fills a cache that it is given, and makes none
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    original = getattr(type(transformer), "original_class", type(transformer))

    device = base.source().device

    def build(seed: int) -> nn.Module:
        # A plan makes nothing; on other devices than the CPU the class would draw otherwise.
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.manual_seed(seed)
            return _without_embedding(original(config))

    def drawn(generator: torch.Generator) -> list[Tensor]:
        return list(build(int(torch.randint(2**62, (), generator=generator))).parameters())

    mirror = build(0).to(device)
    named = dict(mirror.named_parameters())
    for (name, parameter), init in zip(named.items(), jointly(drawn, len(named)), strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(mirror.get_submodule(owner), leaf, base.parameter(*parameter.shape, init=init))
    return mirror


def _without_embedding(model: Any) -> nn.Module:
    """Drop what a mirror never runs: it is given embeddings, and nothing is pooled."""
    unused = {id(model.get_input_embeddings()), id(getattr(model, "pooler", None))}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in unused:
                setattr(module, name, None)
    made: nn.Module = model
    return made


def mirrored(mirror: Any, transformer: Any, inputs: Inputs, embedded: Tensor) -> Tensor:
    """Return the mirror's states (B, T, width) for the base's inputs, their tokens embedded: (B, T, width)."""
    # Whoever changes how the base attends, as for packed rows, does so by its configuration.
    mirror.config._attn_implementation = transformer.config._attn_implementation
    given = {name: inputs.given[name] for name in _PASSED_ON if inputs.given.get(name) is not None}
    cast = {name: parameter.to(embedded.dtype) for name, parameter in mirror.named_parameters()}
    states: Tensor = functional_call(mirror, cast, (), {"inputs_embeds": embedded, **given})[0]
    return states


def with_room(mirror: Any, transformer: Any, inputs: Inputs, *, keeps: bool) -> Inputs:
    """Return the inputs with a cache in which the mirror has layers, or as they are where there is to be none.

    Raises:
        MethodError: the cache has no layers, or was filled without the mirror.
    """
    cache = inputs.given.get("past_key_values")
    if cache is None and keeps and _is_causal(transformer):
        cache = _new_cache(transformer)
    if cache is None:
        return inputs
    held, places = getattr(cache, "layers", None), vars(cache).setdefault(_PLACES, {})
    if held is None or (not inputs.begins and id(mirror) not in places):
        raise MethodError(
            "this cache holds nothing of the shadow",
            hint="go on from a cache that the adapted model filled while no gradient was asked for",
        )
    if inputs.begins:
        blocks, layers = len(blocks_of(transformer)), len(blocks_of(mirror))
        while len(held) < blocks:
            held.append(cache.layer_class_to_replicate())
        places[id(mirror)] = len(held)
        held.extend(copy.deepcopy(layer) for layer in held[:layers])
    _place(mirror, places[id(mirror)])
    return inputs.but(past_key_values=cache)


def _is_causal(transformer: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) for module in transformer.modules())


def _new_cache(transformer: Any) -> Any:
    original = getattr(type(transformer), "original_class", type(transformer))
    return sys.modules[original.__module__].DynamicCache(config=transformer.config)


def _place(mirror: nn.Module, first: int) -> None:
    """Let the mirror's attention find its keys and values in the cache's layers from ``first`` on."""
    for block in blocks_of(mirror):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = first  # type: ignore[assignment]
        first += 1


@contextlib.contextmanager
def along(blocks: list[nn.Module], state: Tensor, inject: Inject, update: Update) -> Iterator[None]:
    """Let a state travel along the blocks inside a ``with`` block; the last one returns its features alone.

    States of several adapters lie one behind another, that of the adapter which began last the farthest.
    """
    width = state.shape[-1]
    inner: list[Tensor] = []  # states that wait for the end of the block that runs

    def before(place: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            own, rest = (x[..., -width:], x[..., :-width]) if place else (state, x)
            inner.append(own)
            hidden = inject(place, rest[..., :width], own)
            return (torch.cat([hidden, rest[..., width:]], dim=-1), *args[1:])

        return hook

    def after(place: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: object, output: Any) -> Any:
            own = inner.pop()
            if place == len(blocks) - 1:
                return output
            y = output[0] if isinstance(output, tuple) else output
            y = torch.cat([y, update(place, y[..., :width], own)], dim=-1)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    with contextlib.ExitStack() as stack:
        for place, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(before(place), prepend=True).remove)
            stack.callback(block.register_forward_hook(after(place)).remove)
        yield
