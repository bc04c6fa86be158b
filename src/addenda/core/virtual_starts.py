"""What virtual positions start from: a text, tokens drawn from the vocabulary, or random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from addenda.core.contract import Base, Initializer
from addenda.core.sequence import Transformer

__all__ = [
    "STARTS",
    "start_problems",
    "start_problems_at",
    "states_of_tokens",
    "tokens_of_vocabulary",
    "uniform",
    "unknown_tokens",
]

STARTS = ("vocabulary", "text", "random")


def start_problems(start: object, ids: Sequence[object], text: object = "") -> list[str]:
    """Check a choice of start and the text to start from.

    Example:
        >>> start_problems("words", ())
        ["start must be one of vocabulary, text, random, got 'words'"]
    """
    found = [] if start in STARTS else [f"start must be one of {', '.join(STARTS)}, got {start!r}"]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        found.append(f"ids must be a list of whole numbers >= 0, got {ids!r}")
    if not isinstance(text, str):
        found.append(f"text must be a text, got {text!r}")
    if (ids or text) and start != "text":
        found.append("a text or its ids are started from with start = 'text' only")
    return found


def start_problems_at(start: str, ids: Sequence[int], base: Base) -> list[str]:
    """Check that the tokens to start from are there, and that the transformer knows them."""
    if start != "text":
        return []
    if not ids:
        return ["start 'text' asks for the tokens of a text: set text in a recipe, or give ids"]
    return unknown_tokens(ids, base)


def unknown_tokens(ids: Sequence[int], base: Base) -> list[str]:
    """Check that the transformer knows the tokens."""
    rows = base.vocabulary if isinstance(base, Transformer) else 0
    return [f"ids hold token {max(ids)}, and the vocabulary ends at {rows - 1}"] if max(ids) >= rows else []


def tokens_of_vocabulary(model: Transformer, ids: Sequence[int]) -> Initializer:
    """Return what fills ``(n, width)`` with the embeddings of tokens.

    Args:
        model: whose embeddings.
        ids: the tokens, repeated or cut to n; none to draw n different ones from the vocabulary.
    """

    def fill(value: Tensor, generator: torch.Generator) -> None:
        with torch.no_grad():
            value.copy_(model.embed(_chosen(model, ids, len(value), generator)))

    return fill


def states_of_tokens(model: Transformer, ids: Sequence[int]) -> Initializer:
    """Return what fills ``(n, layers * 2 * heads * head_width)`` with the keys and values of a text's tokens.

    Args:
        model: whose attention.
        ids: the text, repeated or cut to n; none to draw n different tokens from the vocabulary.
    """

    def fill(value: Tensor, generator: torch.Generator) -> None:
        with torch.no_grad():
            value.copy_(model.recall(_chosen(model, ids, len(value), generator)).movedim(3, 0).flatten(1))

    return fill


def uniform(bound: float) -> Initializer:
    """Return what fills a tensor with numbers between ``-bound`` and ``bound``."""

    def fill(value: Tensor, generator: torch.Generator) -> None:
        value.uniform_(-bound, bound, generator=generator)

    return fill


def _chosen(model: Transformer, ids: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    drawn = torch.tensor(ids) if ids else torch.randperm(model.vocabulary, generator=generator)
    # A plan has refused tokens that the vocabulary does not hold; a miniature of the base may hold fewer.
    return (drawn.repeat(-(-count // len(drawn)))[:count] % model.vocabulary).to(model.device)
