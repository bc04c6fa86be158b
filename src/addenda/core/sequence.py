"""The second contract: methods that change the sequence a model reads, not a layer of it.

Such an adapter stands on a *transformer*: the module that takes token ids and gives hidden states, without a head. It
puts virtual positions in front of every sequence: their embeddings, or the keys and values that attention finds there.
The caller gets no more positions back than it gave, so that heads, labels and losses need to know nothing of them.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.prefix_cache import PrefixCache
from addenda.errors import MethodError

__all__ = [
    "Attention",
    "Inject",
    "Inputs",
    "PrefixAdapter",
    "PromptAdapter",
    "SequenceMethod",
    "Transformer",
    "Update",
    "cut",
    "interleaved",
    "keeps",
    "with_prefix",
    "with_prompt",
]

Inject = Callable[[int, Tensor, Tensor], Tensor]
"""(block, its input (B, T, width), state (B, T, width)) -> the input to use instead."""
Update = Callable[[int, Tensor, Tensor], Tensor]
"""(block, its output, state) -> the state for the next block."""
ROW_MULTIPLE = 128
"""Packed rows are filled up to it: attention on a GPU works on whole blocks, and matrix kernels like few lengths."""


@dataclass(frozen=True)
class Inputs:
    """What a transformer was called with, by name."""

    given: Mapping[str, Any]
    begins: bool = True
    """Whether the sequence begins here, and does not go on from a filled cache."""

    @property
    def tokens(self) -> Tensor:
        """The ids ``(B, T)``, or the embeddings ``(B, T, width)`` that were given in their place."""
        ids = self.given.get("input_ids")
        found: Tensor = self.given["inputs_embeds"] if ids is None else ids
        return found

    def but(self, **changes: Any) -> Inputs:
        """Return the same with other arguments."""
        return dataclasses.replace(self, given={**self.given, **changes})


class Transformer(Base):
    """What a sequence adapter sees of the transformer it stands on; it can read and call, never write."""

    @abstractmethod
    def __call__(self, x: Any) -> Any:
        """Run the transformer as it is: its `Inputs` -> what it returns, hidden states first."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Features of a token's embedding."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """Attention layers."""

    @property
    @abstractmethod
    def key_value_heads(self) -> int:
        """Heads of keys and values in each attention layer."""

    @property
    @abstractmethod
    def head_width(self) -> int:
        """Features of a key, and of a value."""

    @property
    @abstractmethod
    def caches(self) -> bool:
        """Whether a call that does not say otherwise returns a cache to go on from."""

    @property
    def states(self) -> torch.Size:
        """Shape of the keys and values of a token: ``(layers, 2, heads, head_width)``."""
        return torch.Size((self.layers, 2, self.key_value_heads, self.head_width))

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Look tokens up: ``(...)`` -> ``(..., width)``."""

    @abstractmethod
    def recall(self, ids: Tensor) -> Tensor:
        """Return the keys and values of a text ``(n,)`` that stands alone: ``(layers, 2, heads, n, head_width)``."""

    @abstractmethod
    def mirror(self, layers: int) -> nn.Module:
        """Make a new transformer of the same make with so many blocks, to be trained."""

    @abstractmethod
    def mirrored(self, mirror: nn.Module, inputs: Inputs) -> tuple[Inputs, Tensor]:
        """Run a mirror on what the transformer was called with.

        Returns:
            The inputs with which to run the transformer afterwards, and the mirror's states ``(B, T, width)``.
        """

    @abstractmethod
    def along(self, state: Tensor, inject: Inject, update: Update) -> AbstractContextManager[None]:
        """Let a state ``(B, T, width)`` travel along the blocks of what is run inside the ``with`` block.

        Args:
            state: what the first block finds.
            inject: what a block's input becomes.
            update: what the state becomes behind a block; not asked behind the last.
        """


class Attention(Base):
    """What an adapter sees of one self-attention that it adds to."""

    @abstractmethod
    def __call__(self, x: Any) -> Any:
        """Run the attention as it is: its `Inputs` -> what it returns, the output ``(B, T, width)`` first."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Features of a hidden state."""

    @property
    @abstractmethod
    def scaling(self) -> float:
        """Factor on the products of queries and keys."""

    @abstractmethod
    def queries(self, inputs: Inputs) -> Tensor:
        """Return the queries of a call, positions applied: ``(B, heads, T, head_width)``."""

    @abstractmethod
    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Project states ``(n, width)``, at no position: ``(heads, n, head_width)`` each."""

    @abstractmethod
    def finish(self, read: Tensor) -> Tensor:
        """Project what all heads have read, ``(B, heads, T, head_width)``, to ``(B, T, width)``."""


class PromptAdapter(Adapter):
    """Embeddings in front of every sequence."""

    def prompt(self, inputs: Inputs) -> Tensor:
        """Return the embeddings of the virtual positions, ``(n, width)``, or ``(B, n, width)`` sample by sample."""
        raise MethodError(f"{type(self).__name__} defines no prompt", hint="implement prompt(inputs)")

    def forward(self, x: Inputs, base: Base) -> Any:  # type: ignore[override]
        """Run the transformer with the prompt in front; outputs as without it."""
        return with_prompt(cast(Transformer, base), x, self.prompt(x))


class PrefixAdapter(Adapter):
    """Keys and values in front of every sequence, layer by layer."""

    def prefix(self) -> Tensor:
        """Return them as attention reads them, positions applied: ``(layers, 2, heads, n, head_width)``."""
        raise MethodError(f"{type(self).__name__} defines no prefix", hint="implement prefix()")

    def forward(self, x: Inputs, base: Base) -> Any:  # type: ignore[override]
        """Run the transformer with the prefix in front; outputs as without it."""
        return with_prefix(cast(Transformer, base), x, self.prefix())


@dataclass(frozen=True)
class SequenceMethod(Method):
    """The settings of a method that changes the sequence."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer",)
    exceptions: ClassVar[Mapping[str, str]] = {
        "identity": "what stands in front of a sequence is attended to from the first step on"
    }

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return list(paths)

    @property
    def positions(self) -> int:
        return int(getattr(self, "tokens", 0))

    def with_tokens(self, encode: Callable[[str], Sequence[int]]) -> Self:
        text = getattr(self, "text", "")
        changes: dict[str, Any] = {"ids": tuple(encode(text))} if text else {}
        return dataclasses.replace(self, **changes)

    def build(self, base: Base) -> Adapter:
        return self.build_on(cast(Transformer, base))

    @abstractmethod
    def build_on(self, model: Transformer) -> Adapter:
        """Make the adapter for a transformer; all parameters come from ``model.parameter``."""


# -------------------------------------------------------------------------------------------------- virtual positions


def with_prompt(model: Transformer, inputs: Inputs, prompt: Tensor) -> Any:
    """Run a transformer with embeddings in front of every sequence; the output holds the given positions alone.

    Args:
        model: what is run.
        inputs: its arguments. Masks and positions may be given for the tokens that are given, or left out.
        prompt: ``(n, width)``, or ``(B, n, width)``.

    Raises:
        MethodError: an argument leaves no room for further positions.
    """
    added = prompt.shape[-2]
    _require_room(inputs)
    if not inputs.begins:
        return model(_moved(inputs, added))
    embedded = inputs.given.get("inputs_embeds")
    embedded = model.embed(inputs.given["input_ids"]) if embedded is None else embedded
    prompt = prompt.to(embedded.dtype)
    if inputs.given.get("segments") is not None:
        return _packed_with_prompt(model, inputs, embedded, prompt)
    rows = torch.cat([prompt.expand(len(embedded), -1, -1), embedded], dim=1)
    longer = _moved(inputs, added).but(input_ids=None, inputs_embeds=rows)
    if (positions := longer.given.get("position_ids")) is not None:
        front = _front(inputs, added, positions).expand(*positions.shape[:-1], -1)
        longer = longer.but(position_ids=torch.cat([front, positions], dim=-1))
    if (types := inputs.given.get("token_type_ids")) is not None:
        longer = longer.but(token_type_ids=torch.cat([types.new_zeros(len(types), added), types], dim=1))
    return cut(model(longer), lambda states: states[:, added:])


def _front(inputs: Inputs, added: int, positions: Tensor) -> Tensor:
    """The positions of a prompt: the first ones, or those behind a prefix that stands in front of it."""
    cache = inputs.given.get("past_key_values")
    first = 0 if cache is None else cache.get_seq_length()
    return torch.arange(first, first + added, device=positions.device)


def _packed_with_prompt(model: Transformer, inputs: Inputs, embedded: Tensor, prompt: Tensor) -> Any:
    if prompt.dim() > 2:
        raise MethodError(
            "a packed row cannot have a prompt of each sample's own",
            hint="run such samples as a batch of their own, padded",
        )
    added, segments = len(prompt), inputs.given["segments"]
    order, places = interleaved(segments.lengths, embedded.shape[1], added, device=embedded.device)
    positions = inputs.given["position_ids"][0]
    positions = torch.cat([_front(inputs, added, positions), positions + added])
    longer = inputs.but(
        input_ids=None,
        inputs_embeds=torch.cat([prompt, embedded[0]])[order][None],
        position_ids=positions[order][None],
        segments=dataclasses.replace(segments, lengths=tuple(n + added for n in segments.lengths)),
    )
    return cut(model(longer), lambda states: states[:, places])


def interleaved(
    lengths: Sequence[int], tokens: int, added: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return how a packed row is laid out anew with the same further rows in front of each sample.

    Args:
        lengths: tokens of each sample; those of the row behind them belong to none.
        tokens: tokens of the row.
        added: rows in front of each sample.
        device: where the indices are wanted.

    Returns:
        Where each row of the new one comes from, the further rows counted before the old ones; and where each of the
        old ones has gone to.

    Example:
        >>> order, places = interleaved([2, 1], 3, 1, device=torch.device("cpu"))
        >>> order[:5].tolist(), places.tolist(), len(order)
        ([0, 1, 2, 0, 3], [1, 2, 4], 128)
    """
    front = list(range(added))
    order: list[int] = []
    start = added
    for length in lengths:
        order += [*front, *range(start, start + length)]
        start += length
    order += range(start, added + tokens)
    places = [place for place, row in enumerate(order) if row >= added]
    order += [0] * (-len(order) % ROW_MULTIPLE)
    return torch.tensor(order, device=device), torch.tensor(places, device=device)


def with_prefix(model: Transformer, inputs: Inputs, prefix: Tensor) -> Any:
    """Run a transformer whose attention finds further keys and values in front of every sequence.

    Args:
        model: what is run.
        inputs: its arguments, as for `with_prompt`.
        prefix: ``(layers, 2, heads, n, head_width)``, keys first, their positions applied.

    Raises:
        MethodError: an argument leaves no room for further positions, or a layer did not read the prefix.
    """
    added = prefix.shape[-2]
    _require_room(inputs)
    longer = _moved(inputs, added)
    if not inputs.begins:
        return model(longer)
    tokens = inputs.tokens
    prefix = prefix.to(model.dtype)
    if inputs.given.get("segments") is None and longer.given.get("attention_mask") is None:
        shape = (tokens.shape[0], added + tokens.shape[1])
        longer = longer.but(attention_mask=torch.ones(shape, dtype=torch.long, device=tokens.device))
    cache = inputs.given.get("past_key_values")
    if cache is not None and not isinstance(cache, PrefixCache):
        for layer, (keys, values) in enumerate(prefix):
            cache.update(*(x.expand(tokens.shape[0], -1, -1, -1) for x in (keys, values)), layer)
        return model(longer)
    lent = PrefixCache(prefix, keeps=keeps(model, inputs))
    if cache is not None:  # lent by an adapter on top of this one
        lent = cache.with_more(prefix)
    try:
        output = model(longer.but(past_key_values=lent))
    except RuntimeError as problem:  # a mask longer than the keys
        if lent.read:
            raise
        raise _unread(model, lent) from problem
    if len(lent.read) < model.layers:
        raise _unread(model, lent)
    if not lent.keeps and not isinstance(output, tuple) and output.get("past_key_values") is lent:
        output["past_key_values"] = None
    return output


def _unread(model: Transformer, lent: PrefixCache) -> MethodError:
    return MethodError(
        f"{model.layers - len(lent.read)} of {model.layers} layers did not read the prefix",
        where={"model": model.path or "the model itself"},
        hint="transformers' own activation checkpointing takes the cache away from some models: switch it off; "
        "Addenda's loop recomputes blocks without it",
    )


def keeps(model: Transformer, inputs: Inputs) -> bool:
    """Whether the caller will go on from this call's cache: then it must hold the tokens too."""
    asked = inputs.given.get("use_cache")
    return bool(model.caches if asked is None else asked) and not torch.is_grad_enabled()


def _require_room(inputs: Inputs) -> None:
    mask, cache = inputs.given.get("attention_mask"), inputs.given.get("past_key_values")
    problems = []
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        problems.append("the attention mask says for each pair of tokens who sees whom")
    if getattr(cache, "is_compileable", False):
        problems.append("the cache has a fixed size")
    if problems:
        raise MethodError(
            f"no room for virtual positions: {'; '.join(problems)}",
            hint="give a mask of (batch, tokens), and a cache that grows, as transformers' DynamicCache",
        )


def _moved(inputs: Inputs, added: int) -> Inputs:
    """Positions and mask of the given tokens, with so many positions in front of all of them."""
    mask, positions = inputs.given.get("attention_mask"), inputs.given.get("position_ids")
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), added), mask], dim=1)
    return inputs.but(attention_mask=mask, position_ids=None if positions is None else positions + added)


def cut(output: Any, chosen: Callable[[Tensor], Tensor]) -> Any:
    """Leave the given positions of an output alone; attention weights, if asked for, keep all."""
    if isinstance(output, tuple):
        return (chosen(output[0]), *output[1:])
    output["last_hidden_state"] = chosen(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(chosen(states) for states in output["hidden_states"])
    return output
