"""One export from end to end: checked, written beside its name, proven, and only then there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.bases import LoadedBase
from addenda.core.foreign import keep_inputs
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress
from addenda.errors import ConfigError, ExportError, MissingDependencyError
from addenda.export.card import model_card
from addenda.export.folder import new_folder, require_room, sums_of
from addenda.export.format import Format, format_of, require_context, require_type
from addenda.export.job import Job
from addenda.export.parity import Parity, gate, unopened
from addenda.export.probes import Kind, Probes, Row, probes_of

__all__ = ["RECORD", "Gated", "OnGated", "export_adapter"]

RECORD = "export.json"


@dataclass(frozen=True)
class Gated:
    """An export that came to the gate, whether it is let through or not."""

    format: str
    type: str | None
    bytes: int
    """Of all its files."""
    parity: Parity


OnGated = Callable[[Gated], None]


def export_adapter(
    base: LoadedBase | nn.Module,
    handle: Handle,
    to: str,
    folder: str | os.PathLike[str],
    *,
    type: str | None = None,
    inputs: Sequence[Row] = (),
    kind: Kind | None = None,
    calibration: Sequence[Row] = (),
    context: int | None = None,
    allow_drift: bool = False,
    provenance: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    on_gated: OnGated | None = None,
) -> Parity:
    """Write an adapter in a form that other programs load, once the written files have been proven in that program.

    The folder appears whole or not at all, with ``README.md`` and ``export.json`` beside what the format needs. The
    model in memory stays as it was.

    Args:
        base: the model that carries the adapter, best in float32: loaded, or any module.
        handle: the adapter.
        to: name of the format, such as ``"peft"``.
        folder: must not exist, or be empty.
        type: one of the format's types; None for its usual one.
        inputs: keyword arguments of forwards that it is proven on, batch first; a base that was loaded has its own.
        kind: what the model gives for them; ``next-token`` or ``features`` where the base was loaded, else required.
        calibration: rows of the task, for types that round with care.
        context: tokens for which a cache is set aside, in formats that have one.
        allow_drift: write it although it drifted, or could not be told apart from the base; recorded.
        provenance: what the adapter's manifest says of its training.
        on_progress: told of the steps.
        on_gated: told what the gate found, before what falls short is refused.

    Raises:
        ConfigError: there is no such format, type or context, or nothing to prove it on.
        ExportError: it cannot carry the adapter, or does not answer like it.
        BusyError: the folder exists and is not empty.
        DiskFullError: there is no room.

    Example:
        >>> import tempfile
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> handle = addenda.attach(model, addenda.LoRA(rank=2))
        >>> for parameter in handle.parameters():
        ...     _ = nn.init.normal_(parameter)
        >>> inputs = [{"input": torch.randn(3, 8)} for _ in range(8)]
        >>> with tempfile.TemporaryDirectory() as place:
        ...     parity = export_adapter(model, handle, "peft", f"{place}/out", inputs=inputs, kind="features")
        >>> parity.verdict
        'passed'
    """
    form = format_of(to)
    job = _job(form, to, base, handle, type, inputs, kind, provenance, on_progress)
    require_context(to, context, job.base.room if job.base else None)
    job = replace(job, calibration=tuple(calibration), context=context)
    _require_finite(handle)
    with new_folder(folder) as work, _evaluating(job.model):
        require_room(work, form.space(job))
        form.write(job, work)
        parity = _proven(form, job, work, lambda found: on_gated and on_gated(_gated(to, job, work, found)))
        _require(parity, form, allow_drift=allow_drift)
        _record(work, form=form, to=to, job=job, parity=parity, allow_drift=allow_drift)
    return parity


def _job(  # noqa: PLR0917  (what the caller gave, in its order)
    form: Format,
    to: str,
    base: LoadedBase | nn.Module,
    handle: Handle,
    kind_of_numbers: str | None,
    inputs: Sequence[Row],
    kind: Kind | None,
    provenance: Mapping[str, Any] | None,
    on_progress: OnProgress | None,
) -> Job:
    loaded = base if isinstance(base, LoadedBase) else None
    model: nn.Module = loaded.model if loaded else base  # type: ignore[assignment]
    require_type(to, kind_of_numbers)
    if inputs and kind:
        probes = Probes(tuple(inputs), kind)
    elif loaded:
        probes = probes_of(loaded)
    else:
        raise ConfigError(
            "there is nothing to prove the export on",
            hint="give inputs=[{'x': ...}, ...], as the model is called, and kind='classes' or 'features'",
        )
    job = Job(model, handle, probes, loaded, kind_of_numbers, dict(provenance or {}), on_progress)
    return job if kind_of_numbers else replace(job, type=form.default_type(job))


def _require_finite(handle: Handle) -> None:
    for name, parameter in handle.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ExportError(
                f"the adapter's '{name}' holds numbers that are not finite",
                hint="training has broken it: take an earlier checkpoint",
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    keep_inputs(model)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _proven(form: Format, job: Job, work: Path, tell: Callable[[Parity], object]) -> Parity:
    findings = form.audit(job, work)
    try:
        parity = gate(
            job,
            lambda exact: form.open(job, work, exact=exact),
            drifts=form.drifts(job),
            rounding=form.rounding,
            findings=findings,
        )
    except MissingDependencyError as error:
        parity = unopened(findings, f"{error.message}; {error.hint}")
    except ExportError as error:  # the program refuses the file
        tell(unopened([error.message, *findings]))
        raise
    tell(parity)
    return parity


def _gated(to: str, job: Job, work: Path, parity: Parity) -> Gated:
    size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    return Gated(to, job.type, size, parity)


def _require(parity: Parity, form: Format, *, allow_drift: bool) -> None:
    if parity.verdict in {"passed", "unverified"}:
        return
    if parity.verdict != "failed" and allow_drift:
        return
    raise ExportError(
        {
            "failed": "the export does not answer as the trained model does",
            "drifted": "the export has lost too much of what was trained",
            "unproven": "the export could not be proven",
        }[parity.verdict],
        where={"found": parity.words, "loaded with": parity.reader},
        hint="nothing was written; "
        + (
            "report this with the command that was run"
            if parity.verdict == "failed"
            else "allow it with --allow-drift, or take another --type"
            + (f" of {', '.join(form.types)}" if form.types else "")
        ),
    )


def _record(work: Path, *, form: Format, to: str, job: Job, parity: Parity, allow_drift: bool) -> None:
    card = model_card(
        title=f"{job.title} with '{job.handle.name}' as {to}",
        library=form.library or to,
        tags=["addenda", job.handle.method.name],
        usage=form.usage(job),
        provenance=job.provenance,
        parity=parity,
    )
    (work / "README.md").write_text(card, encoding="utf-8")
    record = {
        "format": to,
        "type": job.type,
        "parity": parity.document(),
        "allowed_drift": allow_drift and parity.verdict not in {"passed", "unverified"},
        "sha256": sums_of(work),
        "provenance": dict(job.provenance),
    }
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    (work / RECORD).write_text(text, encoding="utf-8")
