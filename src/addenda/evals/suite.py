"""All measurements of one adapter in one call: before and after on held-out rows, memorising, and general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from addenda.bases.packed import PackedModel
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress
from addenda.data.rows import Example
from addenda.errors import MethodError
from addenda.evals.general_kl import general_kl
from addenda.evals.heldout import TOKENS_PER_BATCH, heldout
from addenda.evals.overfitting import Learning, compare, compare_accuracy, judge, sample_rows
from addenda.evals.results import HeldoutChange, HeldoutMetrics, KLEstimate
from addenda.intervals import Interval

if TYPE_CHECKING:
    from addenda.bases.loaded import LoadedBase

__all__ = ["BaseScores", "Evaluation", "evaluate"]

BaseScores = dict[tuple[Example, ...], HeldoutMetrics]
"""What a base alone makes of rows."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one adapter."""

    heldout: HeldoutChange
    learning: Learning | None
    """The verdict, or None where no training rows were given to compare with."""
    general: KLEstimate
    adapted: HeldoutMetrics
    """Of the held-out rows, row by row, with the adapter: what two runs are compared by."""

    def figures(self) -> dict[str, Any]:
        """Return the figures as plain values under the names of ``summary.json``.

        Nll in nats per trained token, accuracy as a share in [0, 1], KL in nats per token; an interval is a list of
        its two ends, or None where there are too few rows for one.
        """
        held, general = self.heldout, self.general
        figures: dict[str, Any] = {
            "heldout_rows": held.rows,
            "heldout_tokens": held.tokens,
            "heldout_nll_before": held.nll_before,
            "heldout_nll_after": held.nll_after,
            "heldout_nll_change": held.nll_change.value,
            "heldout_nll_change_interval": _ends(held.nll_change),
            "heldout_token_accuracy_before": held.accuracy_before,
            "heldout_token_accuracy_after": held.accuracy_after,
            "heldout_token_accuracy_change_interval": _ends(held.accuracy_change),
            "base_kl_general": general.mean,
            "base_kl_general_interval": _ends(general.interval),
            "base_kl_general_answers": general.answer_mean,
            "base_kl_general_tokens": general.tokens,
            "base_agreement_general": general.agreement,
        }
        return figures | (_learning_figures(self.learning) if self.learning else {})


def evaluate(
    base: LoadedBase,
    handle: Handle,
    examples: Sequence[Example],
    *,
    train_examples: Sequence[Example] = (),
    tokens_per_batch: int = TOKENS_PER_BATCH,
    seed: int = 0,
    base_scores: BaseScores | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Measure an adapter: held-out rows with and without it, as many training rows, and general prompts.

    Args:
        base: a causal language model.
        handle: an adapter on it, enabled and not merged.
        examples: encoded rows that training did not see.
        train_examples: encoded rows that it did see, to tell learning from memorising; an evenly spaced sample of
            them is used, as many as there are `examples`.
        tokens_per_batch: tokens run at once.
        seed: of the bootstrap.
        base_scores: what the base alone made of rows before, for several adapters on one base: what is there is not
            measured again, and what is not is added.
        on_progress: told of the rows and prompts done.

    Raises:
        MethodError: the adapter is disabled, merged or detached.
        DataError: there are no rows, or rows without a trained token.
    """
    if not handle.active:
        raise MethodError(
            f"adapter '{handle.name}' is disabled, so nothing changes", hint="call enable() first"
        )
    packed = PackedModel(base.model)
    known: BaseScores = {} if base_scores is None else base_scores

    def before_and_after(rows: Sequence[Example], which: str) -> tuple[HeldoutMetrics, HeldoutMetrics]:
        def measure(model: str) -> HeldoutMetrics:
            task = f"{which} rows, {model}"
            return heldout(
                base,
                rows,
                packed=packed,
                tokens_per_batch=tokens_per_batch,
                task=task,
                on_progress=on_progress,
            )

        key = tuple(rows)
        if key not in known:
            with handle.disabled():
                known[key] = measure("base")
        return known[key], measure("adapted")

    held = before_and_after(examples, "held-out")
    seen = sample_rows(train_examples, len(examples))
    return Evaluation(
        heldout=_change(*held, seed=seed),
        learning=judge(held, before_and_after(seen, "training"), seed=seed) if seen else None,
        general=general_kl(base, handle, packed=packed, seed=seed, on_progress=on_progress),
        adapted=held[1],
    )


def _change(before: HeldoutMetrics, after: HeldoutMetrics, *, seed: int) -> HeldoutChange:
    return HeldoutChange(
        nll_before=before.nll_per_token,
        nll_after=after.nll_per_token,
        nll_change=compare(before, after, seed=seed),
        accuracy_before=before.token_accuracy,
        accuracy_after=after.token_accuracy,
        accuracy_change=compare_accuracy(before, after, seed=seed),
        tokens=after.tokens,
        rows=after.rows,
    )


def _learning_figures(learning: Learning) -> dict[str, Any]:
    return {
        "verdict": learning.verdict,
        "verdict_sentence": learning.sentence,
        "train_nll_change": learning.train_change.value,
        "train_nll_change_interval": _ends(learning.train_change),
        "gap": learning.gap.value,
        "gap_interval": _ends(learning.gap),
        "verbatim_heldout": learning.verbatim_heldout.value,
        "verbatim_train": learning.verbatim_train.value,
    }


def _ends(known: Interval) -> list[float] | None:
    return None if known.low is None or known.high is None else [known.low, known.high]
