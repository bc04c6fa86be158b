"""``addenda check``: faults of the data, and what would be trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.recipe_flags import read_input, recipe_flags
from addenda.cli.verb import verb
from addenda.errors import visible

if TYPE_CHECKING:
    from addenda.bases import LoadedBase
    from addenda.data import Dataset, Example
    from addenda.settings import BaseSettings, DataSettings

__all__ = ["command"]

_MOST_FINDINGS = 20


@verb(
    "check",
    examples=[
        "addenda check rows.jsonl",
        "addenda check rows.jsonl --show 3",
        "addenda check rows.csv --set data.prompt=question --set data.completion=answer",
        "cat rows.jsonl | addenda check - --json",
    ],
)
@click.argument("data")
@click.option(
    "--show", type=click.IntRange(min=0), default=0, metavar="N", help="Show N rows, trained tokens marked."
)
@click.option("--valid", metavar="FILE", help="Validation rows, checked too.")
@recipe_flags
def command(console: Console, data: str, show: int, valid: str | None, **flags: Any) -> int:
    """Check training data: a file, a folder with train and valid files, or - for standard input.

    Each fault is shown with file, line, column, JSON path and how to correct it. Ends with 3 if there are errors.
    --show loads the base and shows rows as it would read them, with the trained tokens in colour (in brackets where
    there is no colour).
    """
    from addenda.data import read_dataset

    source, settings = read_input(**flags, data__path=data, data__valid=valid)
    columns = {key: value for key in ("prompt", "completion") if (value := getattr(settings, key))}
    with Display(console) as display:
        dataset = read_dataset(
            data, valid=settings.valid, shape=settings.shape, columns=columns, on_progress=display
        )
        parts = {"train": dataset, "valid": dataset.valid, "test": dataset.test}
        there = {name: part for name, part in parts.items() if part is not None}
        shown = _shown(source, settings, dataset, show, display)
    failed = any(part.report.has_errors for part in there.values())
    document = {
        "ok": not failed,
        "parts": {name: _document(part) for name, part in there.items()},
        "shown": [_row(example, base) for example, base in shown],
    }
    console.result(document, lambda: _text(console, there, shown))
    return 3 if failed else 0


def _document(part: Dataset) -> dict[str, object]:
    facts = {"file": part.name, "detected": part.detected, "shape": part.shape, "sha256": part.sha256}
    return {**facts, "rows": part.row_count, "good_rows": len(part), **part.report.to_json(_MOST_FINDINGS)}


def _shown(
    source: BaseSettings, settings: DataSettings, dataset: Dataset, show: int, display: Display
) -> list[tuple[Example, LoadedBase]]:
    if not show or not len(dataset):
        return []
    from dataclasses import replace
    from itertools import islice

    from addenda.data import encode_rows
    from addenda.recipe import encoder_for, prepare_base

    base = prepare_base(replace(source, device="cpu"), None, display)  # only its tokenizer is used
    encoded = encode_rows(islice(dataset.conversations, show), encoder_for(base, settings))
    for line in encoded.report.lines():
        display.say(line)
    return [(example, base) for example in encoded.examples]


def _row(example: Example, base: LoadedBase) -> dict[str, object]:
    from addenda.data.show import segments

    return {
        "row": str(example.row),
        "tokens": len(example),
        "trained_tokens": example.trained_tokens,
        "segments": [{"text": text, "trained": on} for text, on in segments(example, base.tokenizer)],
    }


def _text(console: Console, parts: dict[str, Dataset], shown: list[tuple[Example, LoadedBase]]) -> str:
    lines = []
    for name, part in parts.items():
        report = part.report
        counts = (_counted(report.errors, "error"), _counted(report.warnings, "warning"))
        verdict = ", ".join(counts) if len(report) else "no fault found"
        lines += [visible(f"{name}: {part.name}: {part.detected}: {verdict}"), *report.lines(_MOST_FINDINGS)]
    for example, base in shown:
        head = f"{example.row}: {len(example):,} tokens, {example.trained_tokens:,} of them trained"
        lines += ["", console.paint(head, bold=True), _marked(console, example, base)]
    return "\n".join(lines)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _marked(console: Console, example: Example, base: LoadedBase) -> str:
    from addenda.data.show import bracketed, segments

    if console.paint("x", fg="green") == "x":
        return bracketed(example, base.tokenizer)
    parts = ((visible(text), on) for text, on in segments(example, base.tokenizer))
    return "".join(console.paint(text, fg="green") if on else text for text, on in parts)
