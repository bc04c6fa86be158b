"""The gate: what was written answers, in the program it is for, like the model that was trained.

Two questions are kept apart. *Is it right?* is asked of an exact twin, where nothing is rounded that need not be: its
answers may differ from the trained model's by what float32 leaves open, and the adapter has to change them by far
more than that, or a missing adapter would pass too. *What is lost?* is asked of the file itself, whose weights may be
rounded on purpose: how far its answers are from the trained model's, and how much of the adapter's change they keep.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from addenda.export.chat import ChatParity, compare_chats
from addenda.export.job import Job
from addenda.export.probes import Kind, answer
from addenda.export.roundoff import with_last_bits_disturbed
from addenda.export.runtime import Runtime
from addenda.intervals import Interval, interval_of_ratio

__all__ = ["Closeness", "Parity", "Verdict", "compare", "gate", "unopened"]

EXACT_LIMIT = 1e-3
"""Nats that a log-probability may differ where nothing is rounded, beside what `ROUNDINGS` leaves; 4e-5 is usual."""
FEATURE_LIMIT = 1e-4
"""The same for features, as a share of the largest."""
ROUNDINGS, DRAWS = 2.0, 2
"""How many times as much as the last bits of sums move the trained model's answer at a position, and whatever else a
program rounds by itself, its answer there may differ more; and how often that is tried."""
LEAST_EFFECT = 20.0
"""How many times the limit the adapter must change some answer, so that a fault cannot hide."""
LEAST_COSINE, LEAST_SIZE, MOST_SIZE = 0.7, 0.8, 1.25
"""Of what the file keeps of the adapter's change; short of these the export has drifted. The size is what is kept,
whatever noise the rounding of the base adds; that lowers the cosine, to 0.87 for an adapter beside four bits."""

Verdict = Literal["passed", "drifted", "failed", "unproven", "unverified"]
Open = Callable[[bool], Runtime]
"""Loads what was written: the exact twin if True, else the file itself."""
Rounding = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True)
class Closeness:
    """How one runtime's answers compare with the trained model's."""

    runtime: str
    positions: int
    largest_difference: float
    """Of a log-probability in nats, or of a feature in its own unit, of all that the runtime tells at the position that
    comes nearest to its limit."""
    limit: float
    """What may differ there where nothing is rounded."""
    kl: Interval | None
    """KL divergence of the runtime's distribution from the trained model's, nats per position; None for features."""
    top1_agreement: float | None
    """Share in [0, 1] of positions with the same most likely token or class; None for features."""
    effect_cosine: Interval | None
    """Cosine of the change that the file makes to the base's answers with the change that the adapter makes."""
    effect_size: Interval | None
    """How long the former is along the latter, 1 being all of it; None where the adapter changes nothing."""

    @property
    def exact(self) -> bool:
        """Whether nothing differs by more than the limit; false for answers that are not numbers."""
        return self.largest_difference <= self.limit


@dataclass(frozen=True)
class Parity:
    """What the gate found."""

    verdict: Verdict
    words: str
    """The verdict in a sentence."""
    effect: float
    """Largest change that the adapter makes to an answer, in the unit of `Closeness.largest_difference`."""
    twin: Closeness | None = None
    """Of the exact twin; of the file itself where that is exact."""
    real: Closeness | None = None
    """Of the file itself."""
    chat: ChatParity | None = None
    findings: tuple[str, ...] = ()
    """What reading the file back showed to be other than meant."""

    @property
    def reader(self) -> str:
        """The program that loaded it, or why none did."""
        told = self.real or self.twin
        return told.runtime if told else "not loaded"

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.verdict}: {self.words}"


def gate(
    job: Job,
    open_export: Open,
    *,
    drifts: bool,
    rounding: Rounding = lambda _model: nullcontext(),
    findings: Sequence[str] = (),
) -> Parity:
    """Compare an export with the model it was made from.

    Args:
        job: the model with its adapter at work, and what to ask.
        open_export: loads the export; called once, or twice where the file is rounded on purpose.
        drifts: whether it is.
        rounding: lets a model compute within a ``with`` block what the program rounds by itself.
        findings: what reading the file back showed.
    """
    with tempfile.TemporaryDirectory() as place:
        trained = _Spool(Path(place) / "trained", _answers(job, "ask the trained model"))
        with job.handle.disabled():
            bare = _Spool(Path(place) / "bare", _answers(job, "ask the base"))
        effect = max(float((a - b).abs().max()) for a, b in zip(trained, bare, strict=True))
        slack = _left_open(job, trained, rounding)
        # Opened once the model has answered: PEFT's folder is read onto the model itself.
        with open_export(not drifts) as runtime:
            twin = real = compare(runtime, job, trained, bare, task="ask the export", slack=slack)
            chat = compare_chats(job, runtime.chat) if runtime.chat and job.base else None
        if drifts:
            with open_export(True) as runtime:
                twin = compare(
                    runtime, job, trained, bare, task="ask its exact twin", switch=False, slack=slack
                )
    verdict, words = _judge(effect, twin, real, chat, findings)
    return Parity(verdict, words, effect, twin, real, chat, tuple(findings))


def unopened(findings: Sequence[str], why: str = "") -> Parity:
    """Return what is known of an export that no program has answered with.

    Args:
        findings: what is wrong with it; none where that could not be found out.
        why: the reason, where the program is only missing.
    """
    if findings:
        return Parity("failed", _read_back(findings), math.nan, findings=tuple(findings))
    return Parity("unverified", f"not verified: {why}", math.nan)


def _read_back(findings: Sequence[str]) -> str:
    return "reading it back shows: " + "; ".join(findings)


def _answers(job: Job, task: str) -> Iterator[Tensor]:
    return _told(job, (answer(job.model, row, job.probes.kind) for row in job.probes.rows), task)


def _left_open(job: Job, trained: Iterable[Tensor], rounding: Rounding) -> list[Tensor]:
    """How far two right answers may lie apart at each position, (n,) a row: asked of the trained model itself."""
    moved = [torch.zeros(len(each)) for each in trained]
    for draw in range(DRAWS):
        with rounding(job.model), with_last_bits_disturbed(job.model, draw):
            rounded = _answers(job, "ask the trained model, rounded otherwise")
            pairs = zip(moved, trained, rounded, strict=True)
            moved = [most.maximum((a - b).abs().amax(-1)) for most, a, b in pairs]
    return [ROUNDINGS * each for each in moved]


def _told(job: Job, made: Iterator[Tensor], task: str) -> Iterator[Tensor]:
    for done, tensor in enumerate(made, start=1):
        yield tensor
        job.say(task, done, len(job.probes.rows), "prompts")


class _Spool:
    """Answers on disk: those of a large vocabulary are larger than the model."""

    def __init__(self, folder: Path, made: Iterator[Tensor]) -> None:
        folder.mkdir()
        self._paths = []
        for number, tensor in enumerate(made):
            self._paths.append(folder / f"{number}.npy")
            np.save(self._paths[-1], tensor.numpy())

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.from_numpy(np.load(path)) for path in self._paths)


# ------------------------------------------------------------------------------------------------------- comparing


@dataclass
class _Sums:
    """Over one row: what the figures are ratios of."""

    positions: int
    difference: float
    limit: float
    kl: float
    same: int
    along: float
    meant: float
    kept: float


def compare(
    runtime: Runtime,
    job: Job,
    trained: Iterable[Tensor],
    bare: Iterable[Tensor],
    *,
    task: str,
    slack: Sequence[Tensor],
    switch: bool = True,
) -> Closeness:
    """Ask a runtime every row and compare.

    Args:
        runtime: the loaded export.
        job: what to ask.
        trained: the trained model's answers, row by row.
        bare: those of the base without the adapter.
        task: what progress is reported as.
        switch: whether to ask a runtime that can switch the adapter off without it too, so that what its own
            arithmetic does to the base is not taken for a loss of the adapter's.
        slack: how much more than usual may differ at each position where the file rounds nothing, (n,) a row.
    """
    rows, kind = job.probes.rows, job.probes.kind
    with tempfile.TemporaryDirectory() as place:
        found = _Spool(Path(place) / "found", _told(job, runtime.answers(rows, kind), task))
        before = bare
        if switch and runtime.has_base:
            alone = runtime.answers(rows, kind, adapted=False)
            before = _Spool(Path(place) / "before", _told(job, alone, f"{task}, without the adapter"))
        usual = (
            EXACT_LIMIT if kind != "features" else FEATURE_LIMIT * max(float(a.abs().max()) for a in trained)
        )
        limits = [usual + each for each in slack]
        sums = [_sums(*each, kind) for each in zip(trained, bare, found, before, limits, strict=True)]
    scores = kind != "features"
    positions = sum(each.positions for each in sums)
    worst = max(sums, key=lambda each: each.difference / each.limit)
    return Closeness(
        runtime=runtime.name,
        positions=positions,
        largest_difference=worst.difference,
        limit=worst.limit,
        kl=_ratio([s.kl for s in sums], [s.positions for s in sums]) if scores else None,
        top1_agreement=sum(each.same for each in sums) / positions if scores else None,
        effect_cosine=_ratio([s.along for s in sums], [math.sqrt(s.meant * s.kept) for s in sums]),
        effect_size=_ratio([s.along for s in sums], [s.meant for s in sums]),
    )


def _ratio(amounts: list[float], weights: list[float] | list[int]) -> Interval | None:
    usable = [(a, w) for a, w in zip(amounts, weights, strict=True) if w > 0 and math.isfinite(a)]
    return interval_of_ratio([a for a, _ in usable], [w for _, w in usable]) if usable else None


def _sums(wanted: Tensor, base: Tensor, found: Tensor, before: Tensor, limits: Tensor, kind: Kind) -> _Sums:  # noqa: PLR0917
    """Sum up one row; what the runtime does not tell (NaN) counts for nothing, and nothing told is a fault."""
    same_form = found.shape == wanted.shape
    told = ~(found.isnan() | before.isnan()) if same_form else torch.zeros(())
    heard = told.any(-1)  # some programs tell the answer after a part of the row alone
    if not bool(heard.any()):
        return _Sums(len(wanted), math.inf, float(limits.max()), math.inf, 0, 0.0, 0.0, 0.0)
    wanted, base, found, before, limits, told = (
        each[heard] for each in (wanted, base, found, before, limits, told)
    )
    zero = torch.zeros(())
    differences = torch.where(told, found - wanted, zero).abs().amax(-1).nan_to_num(nan=math.inf)
    worst = int((differences / limits).argmax())
    meant = torch.where(told, wanted - base, zero).double()
    kept = torch.where(told, found - before, zero).double()
    if kind != "features":  # what is all but impossible does not count as much as what is likely
        weight = (0.5 * (wanted.exp() + base.exp())).double().sqrt()
        meant, kept = meant * weight, kept * weight
    scores = kind != "features"
    return _Sums(
        positions=len(wanted),
        difference=float(differences[worst]),
        limit=float(limits[worst]),
        kl=max(0.0, float(_kl(wanted, found, told).sum())) if scores else 0.0,
        same=int((_filled(found).argmax(-1) == wanted.argmax(-1)).sum()) if scores else 0,
        along=float((meant * kept).sum()),
        meant=float((meant * meant).sum()),
        kept=float((kept * kept).sum()),
    )


def _filled(found: Tensor) -> Tensor:
    return found.nan_to_num(nan=-math.inf)


def _kl(wanted: Tensor, found: Tensor, told: Tensor) -> Tensor:
    """KL(wanted ‖ found) of each position; what is not told is taken together as one outcome, a lower bound."""
    p, q = wanted.double(), torch.where(told, found, torch.zeros(())).double()
    inside = torch.where(told, p.exp() * (p - q), torch.zeros((), dtype=torch.float64)).sum(-1)
    p_rest = torch.where(told, torch.zeros(()), wanted).double().exp().mul(~told).sum(-1)
    q_rest = (1 - torch.where(told, q.exp(), torch.zeros((), dtype=torch.float64)).sum(-1)).clamp(min=1e-12)
    rest = torch.where(p_rest > 1e-12, p_rest * (p_rest.clamp(min=1e-12).log() - q_rest.log()), 0.0)
    return inside + rest


# --------------------------------------------------------------------------------------------------------- judging


def _judge(
    effect: float,
    twin: Closeness,
    real: Closeness,
    chat: ChatParity | None,
    findings: Sequence[str],
) -> tuple[Verdict, str]:
    if findings:
        return "failed", _read_back(findings)
    if not twin.exact:
        return "failed", (
            f"in {twin.runtime} an answer differs by {twin.largest_difference:.2g}, where {twin.limit:.2g} is what "
            "rounding leaves open"
        )
    if chat is not None and chat.problems:
        return "failed", "; ".join(chat.problems)
    if not effect >= LEAST_EFFECT * twin.limit:
        return "unproven", (
            f"the adapter changes no answer by more than {effect:.2g}, which is too little to tell a fault by"
        )
    if short := _drift(real):
        return "drifted", short
    return "passed", _praise(twin, real)


def _drift(real: Closeness) -> str:
    size, cosine = real.effect_size, real.effect_cosine
    if size is None or cosine is None:
        return "nothing of the adapter's change is left"
    if cosine.value >= LEAST_COSINE and LEAST_SIZE <= size.value <= MOST_SIZE:
        return ""
    return (
        f"of the adapter's change of the answers the file keeps {size.value:.0%} in size, at a cosine of "
        f"{cosine.value:.2f} (at least {LEAST_SIZE:.0%} and {LEAST_COSINE:.2f} are wanted)"
    )


def _praise(twin: Closeness, real: Closeness) -> str:
    told = (
        f"answers in {twin.runtime} differ by at most {twin.largest_difference:.1g} (limit {twin.limit:.1g})"
    )
    if real.top1_agreement is not None:
        told += f", same first choice at {real.top1_agreement:.1%} of {real.positions} positions"
    if real is not twin and real.effect_size and real.effect_cosine:
        told += (
            f"; the file itself keeps {real.effect_size.value:.0%} of the adapter's change, "
            f"at a cosine of {real.effect_cosine.value:.3f}"
        )
    return told
