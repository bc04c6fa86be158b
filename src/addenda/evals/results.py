"""What the measurements return: plain values, so that a report can be written without a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from addenda.intervals import Interval

__all__ = ["HeldoutChange", "HeldoutMetrics", "KLEstimate", "PromptShift", "RowScore", "SamplePair"]


class RowScore(NamedTuple):
    """How one row's trained tokens fared."""

    nll_sum: float
    """Negative log-likelihood summed over the row's trained tokens, in nats."""
    tokens: int
    """How many trained tokens the row has, at least 1."""
    correct: int
    """How many of them were the single most likely next token."""

    @property
    def verbatim(self) -> bool:
        """Whether greedy decoding reproduces the row's answer word for word.

        Each token is the most likely one after the true tokens before it, so greedy decoding from the prompt writes
        exactly these tokens, one after the other.

        Example:
            >>> RowScore(0.3, tokens=5, correct=5).verbatim
            True
        """
        return self.correct == self.tokens


@dataclass(frozen=True)
class HeldoutMetrics:
    """How well a model predicts the trained tokens of a set of rows.

    Example:
        >>> HeldoutMetrics.of([RowScore(2.0, 4, 1), RowScore(4.0, 4, 3)]).nll_per_token
        0.75
    """

    nll_per_token: float
    """Mean negative log-likelihood in nats per trained token, each token counting once."""
    token_accuracy: float
    """Share in [0, 1] of trained tokens that were the most likely next token."""
    tokens: int
    """Trained tokens counted."""
    rows: int
    """Rows counted."""
    per_row: tuple[RowScore, ...]
    """One score a row, in the order the rows were given."""

    @classmethod
    def of(cls, scores: list[RowScore]) -> HeldoutMetrics:
        """Sum row scores up; `scores` must not be empty."""
        tokens = sum(score.tokens for score in scores)
        return cls(
            nll_per_token=sum(score.nll_sum for score in scores) / tokens,
            token_accuracy=sum(score.correct for score in scores) / tokens,
            tokens=tokens,
            rows=len(scores),
            per_row=tuple(scores),
        )


@dataclass(frozen=True)
class HeldoutChange:
    """Held-out rows, base against adapted."""

    nll_before: float
    """Nats per trained token."""
    nll_after: float
    nll_change: Interval
    """After minus before, paired by row."""
    accuracy_before: float
    """Share in [0, 1] of trained tokens that were the most likely next one."""
    accuracy_after: float
    accuracy_change: Interval
    tokens: int
    rows: int


@dataclass(frozen=True)
class PromptShift:
    """How far one general prompt's predictions moved."""

    topic: str
    prompt: str
    kl_sum: float
    """KL(base || adapted) in nats, summed over the prompt's positions."""
    tokens: int
    """Positions compared."""
    agreeing: int
    """Positions where both models name the same most likely next token."""

    @property
    def kl_per_token(self) -> float:
        """Mean KL of this prompt in nats per token."""
        return self.kl_sum / self.tokens


@dataclass(frozen=True)
class KLEstimate:
    """How far the adapted model's predictions are from the base's on general prompts, in nats per token."""

    mean: float
    """KL(base || adapted) per token, full vocabulary, each position counting once; 0 means the same predictions."""
    low: float | None
    """Lower end of the 95 % interval over prompts, at least 0, or None with too few prompts."""
    high: float | None
    """Upper end of the 95 % interval over prompts, or None with too few prompts."""
    tokens: int
    """Positions compared."""
    answer_mean: float
    """The same mean over the positions that predict the answers' tokens alone."""
    agreement: float
    """Share in [0, 1] of positions where both models name the same most likely next token."""
    prompts: tuple[PromptShift, ...]
    """One entry a prompt."""
    skipped: int = 0
    """Prompts that the base's chat template or context cannot hold."""

    @property
    def interval(self) -> Interval:
        """The mean as an interval over prompts."""
        return Interval(self.mean, self.low, self.high, len(self.prompts))


@dataclass(frozen=True)
class SamplePair:
    """One held-out question answered by the base and by the adapted model, both greedily."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) of every turn the models were shown; the last is the question."""
    reference: str
    """The answer written in the data."""
    before: str
    """The base's answer."""
    after: str
    """The adapted model's answer."""
