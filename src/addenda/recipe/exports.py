"""A run's report tells of the exports of its adapter."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from addenda.errors import AddendaError, CheckpointError
from addenda.evals.record import ExportFacts, RunRecord
from addenda.evals.report import write_report
from addenda.export.run import Gated, OnGated
from addenda.recipe.folder import ADAPTER, RECORD, REPORT, write_text
from addenda.recipe.prepare import Note, OnRunEvent
from addenda.recipe.record import versions
from addenda.train import lock_run

__all__ = ["reported_exports"]


@contextmanager
def reported_exports(adapter: str | os.PathLike[str], on_event: OnRunEvent) -> Iterator[OnGated]:
    """Put what the gate found within the block into the report of the run that made the adapter, if one did.

    An export that was refused is told of like one that was not. A report that cannot be written is noted, and no
    reason for an export to fail.

    Args:
        adapter: a folder of an adapter, or the run folder around it.
        on_event: told where it is shown, or why it is not.

    Yields:
        What is to be told of each export that came to the gate.
    """
    run = _run_of(Path(adapter))
    began = _finished(run) if run else ""
    found: list[Gated] = []
    kept = False
    try:
        yield found.append
        kept = True
    finally:
        if run and found:
            on_event(Note(_reported(run, began, [_facts(each, kept=kept) for each in found])))


def _run_of(adapter: Path) -> Path | None:
    place = adapter.resolve()
    run = place.parent if place.name == ADAPTER and not (place / ADAPTER).is_dir() else place
    return run if (run / RECORD).is_file() else None


def _finished(run: Path) -> str:
    try:
        return _read(run).finished
    except (AddendaError, OSError):
        return ""


def _read(run: Path) -> RunRecord:
    return RunRecord.from_json((run / RECORD).read_text(encoding="utf-8"))


def _reported(run: Path, began: str, made: Sequence[ExportFacts]) -> str:
    try:
        with lock_run(run):
            record = _read(run)
            if record.finished != began:
                raise CheckpointError("the run was trained anew in the meantime", hint="export it again")
            latest = {(each.format, each.type): each for each in (*record.exports, *made)}
            record = dataclasses.replace(record, exports=tuple(latest.values()))
            write_text(run / RECORD, record.to_json() + "\n")
            write_report(run / REPORT, record)
    except (AddendaError, OSError) as error:
        why = error.message if isinstance(error, AddendaError) else error.strerror
        return f"warning: '{run / REPORT}' does not show this export: {why}"
    return f"shown in '{run / REPORT}'"


def _facts(found: Gated, *, kept: bool) -> ExportFacts:
    parity = found.parity
    twin, real = parity.twin, parity.real
    return ExportFacts(
        format=found.format,
        type=found.type or "",
        checked=datetime.now(UTC).isoformat(timespec="seconds"),
        version=versions()["addenda"],
        verdict=parity.verdict,
        words=parity.words,
        kept=kept,
        bytes=found.bytes,
        runtime=parity.reader,
        twin_difference=twin.largest_difference if twin and math.isfinite(twin.largest_difference) else None,
        twin_limit=twin.limit if twin else None,
        kl=real.kl if real else None,
        top1_agreement=real.top1_agreement if real else None,
        effect_size=real.effect_size if real else None,
        effect_cosine=real.effect_cosine if real else None,
    )
