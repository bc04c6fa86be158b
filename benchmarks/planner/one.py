"""One configuration: what was foretold before the weights were loaded, and what a few steps took."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True)
parser.add_argument("--work", required=True, type=Path)
parser.add_argument("--out", required=True, type=Path)
parser.add_argument("--set", action="append", default=[])
options = parser.parse_args()

from addenda import train  # noqa: E402
from addenda.recipe.prepare import prepare  # noqa: E402
from addenda.settings import resolve  # noqa: E402
from addenda.train.parallel import Parallel  # noqa: E402

steps: list[train.StepEvent] = []
notes: list[str] = []


def on_event(event: object) -> None:
    if isinstance(event, train.StepEvent):
        steps.append(event)
    if isinstance(event, train.StartEvent):
        notes.append(event.memory)


recipe = resolve(flags={"data.path": options.data}, sets=options.set)
ready = prepare(recipe, on_event, Parallel())
train.train(
    ready.base,
    ready.handle,
    ready.train.examples,
    [],
    ready.recipe.train,
    run_dir=options.work,
    on_event=on_event,
)
peak = train.peak_memory_bytes()["rss"]
# The first step meets cold caches, and takes memory that the others find there.
timed = steps[1:]
rates = [step.tokens / step.tokens_per_second for step in timed]
options.out.write_text(
    json.dumps(
        {
            "forecast": ready.forecast,
            "weights": ready.recipe.base.weights,
            "dtype": ready.recipe.base.dtype,
            "run_says": notes[0],
            "steps": len(timed),
            "tokens": sum(step.tokens for step in timed),
            "seconds": sum(rates),
            "median_step_seconds": statistics.median(rates),
            "peak_bytes": peak,
        }
    )
)
