"""Showing what is learned: an example as text, with the trained tokens marked."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from addenda.data.rows import Example
from addenda.errors import visible

__all__ = ["bracketed", "segments"]


def segments(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Cut the text of an example where training begins and ends.

    Args:
        example: what is shown.
        tokenizer: the one it was encoded with.

    Returns:
        (text, trained) by turns; joined, the texts are the decoded example. A character whose bytes are divided
        between trained and other tokens goes with the later ones.
    """
    out: list[tuple[str, bool]] = []
    shown, upto = "", 0
    for trained, run in groupby(example.trained):
        upto += len(list(run))
        text = _decoded(tokenizer, example.input_ids[:upto])
        if upto < len(example):
            text = text.rstrip("\ufffd")  # half a character; the next run completes it
        out.append((text[len(shown) :], trained))
        shown = text
    return [(text, trained) for text, trained in out if text]


def bracketed(example: Example, tokenizer: Any) -> str:
    """Mark the trained parts by square brackets, for terminals and files without color.

    Example:
        >>> class Letters:
        ...     def decode(self, ids, **_): return "".join(map(chr, ids))
        >>> from addenda.data.rows import RowRef
        >>> bracketed(Example((72, 105, 33), (False, True, True), RowRef("a", 1, 0)), Letters())
        'H[i!]'
    """
    parts = ((visible(text), trained) for text, trained in segments(example, tokenizer))
    return "".join(f"[{text}]" if trained else text for text, trained in parts)


def _decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
