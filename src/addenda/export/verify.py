"""The self-test of a bundle or of one export, run where it is to be used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from addenda.bases.cache import sha256_of
from addenda.errors import CheckpointError, NotFoundError
from addenda.export.bundle import MANIFEST, SELFTEST
from addenda.export.run import RECORD
from addenda.export.runtimes.llama_cpp import LlamaCpp, LlamaCppWithAdapter

__all__ = ["Verified", "verify"]


@dataclass(frozen=True)
class Verified:
    """What the self-test found."""

    files: int
    damaged: tuple[str, ...]
    """Files that are missing, or are not those that were written."""
    runtime: str
    """What answered; empty where nothing was asked."""
    kl: float | None
    """Of the answers from those of the trained model, nats a position, over the tokens that were kept."""
    top1: float | None
    """Share of positions with the same first choice."""
    passed: bool
    words: str


def verify(folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> Verified:
    """Check the files of a bundle or an export against their sums, and a bundle's answers against the trained model's.

    Args:
        folder: as ``addenda bundle`` or ``addenda export`` wrote it.
        base: the base's GGUF file, for a bundle that holds an adapter beside it and not the base.

    Raises:
        NotFoundError: it is no such folder, or the base is not there.
        CheckpointError: the base is another than that of the bundle.
        MissingDependencyError: llama.cpp is not installed.
        ExportError: llama.cpp refuses a file.
    """
    place = Path(folder)
    name = next((each for each in (MANIFEST, RECORD) if (place / each).is_file()), None)
    if name is None:
        raise NotFoundError(
            f"'{place}' is no bundle and no export",
            hint="name a folder that addenda bundle or addenda export wrote",
        )
    manifest = json.loads((place / name).read_text(encoding="utf-8"))
    sums: Mapping[str, str] = manifest["sha256"]
    damaged = tuple(
        each
        for each, known in sums.items()
        if not (place / each).is_file() or sha256_of(place / each) != known
    )
    if damaged:
        return _verdict(len(sums), damaged)
    files = manifest.get("llama_cpp") or {}
    if not files:
        why = (
            "it holds nothing for llama.cpp"
            if name == MANIFEST
            else "a self-test comes with 'addenda bundle'"
        )
        return _verdict(len(sums), damaged, told=f"no answers were asked: {why}")
    return _asked(place, manifest, files, len(sums), Path(base) if base else place / "base.gguf")


def _asked(
    place: Path, manifest: Mapping[str, Any], files: Mapping[str, str], count: int, base: Path
) -> Verified:
    rows = json.loads((place / SELFTEST).read_text(encoding="utf-8"))["rows"]
    adapters = [place / files["adapter"]] if "adapter" in files else []
    model = place / files["model"] if "model" in files else base
    if adapters:
        _require_base(model, manifest["base_gguf_sha256"])
    make = LlamaCppWithAdapter if adapters else LlamaCpp
    context = max(len(row["ids"]) for row in rows) + 8
    vocabulary = int(manifest["base"]["vocabulary"])
    with make(model, adapters, exact=False, context=context, vocabulary=vocabulary) as runtime:
        kl, same, positions = 0.0, 0, 0
        for row in rows:
            answers = runtime.answer({"input_ids": torch.tensor([row["ids"]])}, "next-token")
            for found, kept in zip(answers, row["likeliest"], strict=True):
                tokens = torch.tensor([token for token, _ in kept])
                wanted = torch.tensor([value for _, value in kept])
                told = found.nan_to_num(nan=float(found.nan_to_num(nan=0.0).min()))
                kl += float((wanted.exp() * (wanted - told[tokens])).sum())
                same += int(told.argmax() == tokens[0])
                positions += 1
        name = runtime.name
    return _verdict(count, (), name, kl / positions, same / positions, manifest["limits"])


def _require_base(model: Path, known: str | None) -> None:
    if not model.is_file():
        raise NotFoundError(
            "the base's GGUF file is not in the bundle",
            where={"its SHA-256": known},
            hint="give it: --base FILE.gguf",
        )
    if known is not None and sha256_of(model) != known:
        raise CheckpointError(
            "this is another base than the adapter was made for",
            where={"file": model, "SHA-256 of the right one": known},
            hint="take the file that the bundle's README names",
        )


def _verdict(  # noqa: PLR0917  (what was found, in its order)
    files: int,
    damaged: tuple[str, ...],
    runtime: str = "",
    kl: float | None = None,
    top1: float | None = None,
    limits: Mapping[str, float] | None = None,
    *,
    told: str = "",
) -> Verified:
    well = not damaged
    words = f"{files} files checked" + (f", damaged: {', '.join(damaged)}" if damaged else ", all as written")
    if kl is not None and top1 is not None and limits is not None:
        well = well and kl <= limits["kl"] and top1 >= limits["top1"]
        words += (
            f"; answers in {runtime}: KL {kl:.2g} nats (at most {limits['kl']:.2g}), same first choice "
            f"{top1:.1%} (at least {limits['top1']:.1%})"
        )
    return Verified(files, damaged, runtime, kl, top1, well, f"{words}; {told}" if told else words)
