"""What do lean forms save when an encoder is trained in a loop of one's own?

    python benchmarks/encoders/run.py

For each model every form in turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from step import FORMS, MODELS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

import table  # noqa: E402

README = HERE / "README.md"
NAMES = {"own": "as it is", "lean": "lean", "unpadded": "lean, no padding"}


def run_step(model: str, form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contestant in a new process."""
    command = [sys.executable, str(HERE / "step.py"), model, form]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{model}, {form}: {done.stderr[-2000:]}")
    run = {"model": model, "form": form, **json.loads(done.stdout.splitlines()[-1])}
    print(f"{model} {form}: {statistics.median(run['seconds']):.2f} s", file=sys.stderr)
    return run


def render(document: dict[str, Any]) -> str:
    """Return the table."""
    settings = document["settings"]
    lines = [
        f"float32, threads: {settings['threads']}, turns: {settings['repeats']} of {settings['steps']} steps; medians, "
        f"and the fastest and slowest step; {document['date']}, {document['cpu']}"
        f"{', ' + settings['note'] if settings['note'] else ''}.",
        "",
        "| model | form | step, s | of the processor, s | kept for the backward, MB | peak of the process, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in settings["models"]:
        for form in FORMS:
            own = [run for run in document["runs"] if (run["model"], run["form"]) == (model, form)]
            if own:
                steps = [second for run in own for second in run["seconds"]]
                busy = statistics.median(second for run in own for second in run["cpu_seconds"])
                peak = statistics.median(run["peak_bytes"] for run in own)
                spread = f"{min(steps):.2f} to {max(steps):.2f}"
                lines.append(
                    f"| {model} | {NAMES[form]} | {statistics.median(steps):.2f} ({spread}) | {busy:.2f} "
                    f"| {own[0]['kept_bytes'] / 1e6:.0f} | {peak / 1e6:.0f} |"
                )
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every contestant in turns; return the document."""
    turns = [
        (model, form)
        for _ in range(options.repeats)
        for model in options.models
        for form in FORMS
        if not (model == "vit-small" and form == "unpadded")  # images have no padding
    ]
    versions = {name: importlib.metadata.version(name) for name in ("addenda", "torch", "transformers")}
    return {
        "benchmark": "encoders",
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "settings": {
            name: getattr(options, name) for name in ("models", "steps", "repeats", "threads", "note")
        },
        "versions": {"python": platform.python_version()} | versions,
        "runs": [run_step(model, form, options) for model, form in turns],
    }


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, help="keep the result there, and leave the README alone")
    options = parser.parse_args()
    document = measure(options)
    path = options.out or HERE / "results" / f"{document['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(render(document))
    if options.out is None:
        table.write_readme(README, render(document))


if __name__ == "__main__":
    main()
