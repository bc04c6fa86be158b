"""Trainable tokens: single rows of an embedding, and of the head that goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method, ParameterSource
from addenda.core.ranges import LARGEST
from addenda.core.registry import register
from addenda.core.targets import suffixes_present

__all__ = ["Tables", "TrainableTokens", "TrainableTokensAdapter"]

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
_HEADS = ("lm_head", "embed_out", "output_projection")


@register("trainable-tokens")
@dataclass(frozen=True)
class TrainableTokens(Method):
    """Train the embeddings of some tokens, such as new ones, and leave those of all others.

    y = base(x) + D[x]         where x is one of the tokens, on an embedding;   D: (tokens, features)
    y_i = base(x)_i + D_i x    for each token i, on an output head

    D starts at zero, so the adapted layer starts equal to its base. Layers that share one weight, as a tied head and
    its embedding, share one D. Mergeable exactly into a weight that no other layer shares. Parameters: tokens *
    features per weight.

    Args:
        tokens: ids of the tokens, as the tokenizer gives them; each once, at least one.

    Cost: one look-up in D per position, on a head one product with D; the table is never copied.

    Use it when: tokens were added to the vocabulary, or a few, such as a separator, have to mean something else.
    Together with another method the rows may be trained by an adapter of their own beside it.

    Learning rate: 1e-2 is chosen, not tuned. PEFT's method comparison takes 0.2 for two tokens (Llama 3.2 3B,
    MetaMathQA).

    Differs from: PEFT trains the rows themselves, this their change, which is the same but for weight decay. PEFT
    takes a tied head along unasked; here both are targets by default, and an untied head gets rows of its own.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Embedding(9, 4))
        >>> addenda.attach(model, TrainableTokens(tokens=(7, 8)), targets=["0"]).trainable_parameters
        8

    References: PEFT, ``TrainableTokensConfig``; there is no paper.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "embedding")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"tokens": (*range(19, 2, -1), 0)},)

    tokens: tuple[int, ...] = ()
    """Ids of the tokens whose embeddings are trained."""

    def problems(self) -> list[str]:
        whole = isinstance(self.tokens, tuple | list) and all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= LARGEST
            for token in self.tokens
        )
        if not whole:
            return [f"tokens must be a list of whole numbers >= 0, got {self.tokens!r}"]
        return ["tokens names a token twice"] if len(set(self.tokens)) < len(self.tokens) else []

    def problems_at(self, base: Base) -> list[str]:
        rows = base.d_in if _is_read(base) else base.d_out
        beyond = [token for token in self.tokens if token >= rows]
        return [f"token {beyond[0]} is beyond its {rows:,} rows"] if beyond else []

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        return [] if self.tokens else ["tokens names no token"]

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return suffixes_present(paths, _EMBEDDINGS) + suffixes_present(paths, _HEADS) or list(_EMBEDDINGS[:1])

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        owners: list[Base] = []
        owner_of: dict[str, int] = {}
        for base in bases:
            shared = [index for index, owner in enumerate(owners) if owner.tied_to(base)]
            owner_of[base.path] = shared[0] if shared else len(owners)
            owners += [] if shared else [base]
        widths = [owner.d_out if _is_read(owner) else owner.d_in for owner in owners]
        return Tables([source.parameter(len(self.tokens), width) for width in widths], owner_of)

    def build(self, base: Base) -> TrainableTokensAdapter:
        return TrainableTokensAdapter(base.path, self.tokens, is_read=_is_read(base))


def _is_read(base: Base) -> bool:
    """Whether tokens are what the layer reads, rather than what it scores."""
    return base.channels_in is None


class Tables(nn.Module):
    """One (tokens, features) for each weight, and which layer adds to which."""

    def __init__(self, tables: list[nn.Parameter], owner_of: Mapping[str, int]) -> None:
        super().__init__()
        self.tables = nn.ParameterList(tables)
        self.owner_of = dict(owner_of)


class TrainableTokensAdapter(Adapter):
    """Holds nothing itself: its rows are among those that the layers share."""

    additive = True
    may_rest = True
    common: Tables

    def __init__(self, path: str, tokens: Sequence[int], *, is_read: bool) -> None:
        super().__init__()
        self.path, self.is_read = path, is_read
        self.tokens = tuple(tokens)
        self.order = tuple(sorted(range(len(tokens)), key=tokens.__getitem__))

    @property
    def rows(self) -> nn.Parameter:
        """D: (tokens, features)."""
        rows: nn.Parameter = self.common.tables[self.common.owner_of[self.path]]
        return rows

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, rows = base(x), self.rows.to(base.dtype)
        if not self.is_read:
            return y.index_add(-1, self._tensor(self.tokens, x), base.apply(x, rows))
        order = self._tensor(self.order, x)
        known = self._tensor(self.tokens, x)[order]
        place = torch.searchsorted(known, x.long()).clamp_(max=len(known) - 1)
        change = base.apply(order[place], rows.t())
        return y + torch.where((known[place] == x)[..., None], change, torch.zeros_like(change))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tokens, rows = self._tensor(self.tokens, weight), self.rows.to(weight.dtype)
        return weight.index_add(1, tokens, rows.t()) if self.is_read else weight.index_add(
            0, tokens, rows
        ), bias

    @staticmethod
    def _tensor(numbers: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(numbers, device=like.device)
