"""Two answers side by side, as wide as the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from addenda.cli.console import Console

if TYPE_CHECKING:
    from addenda.evals.results import SamplePair

__all__ = ["before_and_after", "side_by_side"]

_WIDEST = 160
_GAP = "  |  "


def side_by_side(left: tuple[str, str], right: tuple[str, str], *, width: int | None = None) -> str:
    """Two titled texts in columns.

    Example:
        >>> print(side_by_side(("base", "I do not know."), ("adapted", "Nine to six."), width=41))
        base                |  adapted
        I do not know.      |  Nine to six.
    """
    whole = min(width or shutil.get_terminal_size().columns, _WIDEST)
    each = max(12, (whole - len(_GAP)) // 2)
    columns = [[title, *_wrapped(text, each)] for title, text in (left, right)]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{one:<{each}}{_GAP}{other}".rstrip() for one, other in rows)


def _wrapped(text: str, width: int) -> Sequence[str]:
    return [line for part in text.strip().splitlines() for line in textwrap.wrap(part, width) or [""]] or [
        "(nothing)"
    ]


def before_and_after(console: Console, pair: SamplePair) -> str:
    """One held-out question with the base's and the adapted model's answer."""
    question = pair.messages[-1][1].strip()
    return (
        console.paint(f"? {question}", bold=True)
        + "\n"
        + side_by_side(("base", pair.before), ("adapted", pair.after))
    )
