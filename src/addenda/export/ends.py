"""An embedding and an output head that share one weight: they part where an adapter stands on one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["ends_of", "tied_ends", "untied"]


def ends_of(model: nn.Module) -> tuple[str, str] | None:
    """Return the paths of the embedding and the output head if they share one weight, else None."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    ends = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    paths = {id(module): path for path, module in model.named_modules()}
    return None if None in ends else (paths[id(ends[0])], paths[id(ends[1])])


def tied_ends(paths: Iterable[str], model: nn.Module) -> list[str]:
    """Return which of the layers at these paths are an embedding and an output head that share one weight."""
    ends = ends_of(model) or ()
    return [path for path in paths if path in ends]


@contextlib.contextmanager
def untied(model: Any) -> Iterator[None]:
    """Let the model's config say inside a ``with`` block that embedding and head have a weight each."""
    model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        model.config.tie_word_embeddings = True
