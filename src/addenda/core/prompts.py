"""Where the prompts lie in what a model is run on, for methods that act on some positions of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Prompts", "Samples"]


class Samples(Protocol):
    """What a packed row says of its samples; travels through the model's forward as the argument ``segments``."""

    prompts: Sequence[int] | None
    """Tokens of each sample's prompt; None where all of it is one."""

    @property
    def bounds(self) -> Sequence[tuple[int, int]]:
        """Start and end of each sample in the row."""


class Prompts(NamedTuple):
    """Each position's place in the prompt of its sample; negative outside of any prompt, as in padding and answers."""

    before: Tensor
    """(rows, tokens) long: how many tokens of the prompt come before."""
    behind: Tensor
    """(rows, tokens) long: how many come behind."""

    def ends(self, first: int, last: int) -> Tensor:
        """Return which positions are among the first or the last tokens of a prompt, (rows, tokens) bool.

        Example:
            >>> Prompts.of_rows(torch.ones(1, 5)).ends(1, 2).long().tolist()
            [[1, 0, 0, 1, 1]]
        """
        inside = self.before >= 0
        return inside & ((self.before < first) | (self.behind < last))

    @classmethod
    def of_samples(cls, samples: Samples, tokens: int, device: torch.device) -> Prompts:
        """Return the places in one packed row of ``tokens`` tokens, (1, tokens)."""
        lengths = [end - start for start, end in samples.bounds]
        before: list[int] = []
        behind: list[int] = []
        for length, prompt in zip(lengths, samples.prompts or lengths, strict=True):
            outside = [-1] * (length - prompt)
            before += [*range(prompt), *outside]
            behind += [*reversed(range(prompt)), *outside]
        fill = [-1] * (tokens - len(before))
        both = torch.tensor([[*before, *fill], [*behind, *fill]], device=device)
        return cls(both[:1], both[1:])

    @classmethod
    def of_rows(cls, real: Tensor, lengths: Tensor | None = None) -> Prompts:
        """Return the places in rows of one sample each.

        Args:
            real: (rows, tokens), not zero where a token is none of the padding, on whichever side that is.
            lengths: (rows,) tokens of each row's prompt; None where all of it is one.
        """
        real = real.bool()
        counts = (real.sum(-1) if lengths is None else lengths)[:, None]
        before = real.long().cumsum(-1) - 1
        inside = real & (before < counts)
        nowhere = torch.full_like(before, -1)
        return cls(torch.where(inside, before, nowhere), torch.where(inside, counts - 1 - before, nowhere))
