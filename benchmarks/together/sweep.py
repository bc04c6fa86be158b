"""A sweep against as many separate runs: how long from the command to the last report, and do they agree?

    python benchmarks/together/sweep.py --data train.jsonl

LoRA on SmolLM2-135M-Instruct with two learning rates and two ranks: once by ``addenda sweep`` as it comes, once with
``--together 1``, once by ``addenda train`` for each. Every command is a process of its own; ways take turns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

from rows import as_chat, first_lines  # noqa: E402

OVER = {"train.learning_rate": ("3e-4", "3e-3"), "method.rank": ("4", "16")}
SETS = {"train.epochs": "1", "evals.samples": "0"}
WAYS = ("together", "one by one", "apart")


def addenda(*arguments: str) -> None:
    """Run the command line, silently."""
    subprocess.run([sys.executable, "-m", "addenda", *arguments, "-q"], check=True, capture_output=True)


def sets(settings: dict[str, str]) -> list[str]:
    """Spell settings for the command line."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def measure(way: str, data: str, folder: Path) -> dict[str, Any]:
    """Train all settings in one way; return the seconds and the held-out loss of each."""
    points = [dict(zip(OVER, values, strict=True)) for values in itertools.product(*OVER.values())]
    started = time.monotonic()
    if way == "apart":
        for number, point in enumerate(points, 1):
            addenda(
                "train", data, "--out", str(folder / "trials" / f"trial-{number:03d}"), *sets(SETS | point)
            )
    else:
        over = [part for key, values in OVER.items() for part in ("--over", f"{key}={','.join(values)}")]
        together = ["--together", "1"] if way == "one by one" else []
        addenda("sweep", data, "--out", str(folder), *over, *together, *sets(SETS))
    seconds = time.monotonic() - started
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/summary.json"))]
    return {
        "way": way,
        "seconds": seconds,
        "heldout_nll": [summary["heldout_nll_after"] for summary in summaries],
        "train_seconds": [summary["train_seconds"] for summary in summaries],
        "peak_rss_bytes": max(summary["peak_rss_bytes"] for summary in summaries),
    }


def main() -> None:
    """Run all ways in turns, keep what was measured, and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="jsonl of chats or of question and answer")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as work:
        chats = Path(work) / "chats.jsonl"
        lines = first_lines(Path(options.data), options.rows)
        chats.write_text(
            "".join(json.dumps(as_chat(json.loads(line))) + "\n" for line in lines), encoding="utf-8"
        )
        for repeat, way in itertools.product(range(options.repeats), WAYS):
            runs.append(measure(way, str(chats), Path(work) / f"{repeat}-{way.replace(' ', '-')}"))
            print(json.dumps(runs[-1]), flush=True)
    names = ("addenda", "torch", "transformers")
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "rows": options.rows,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "runs": runs,
    }
    results = HERE / "results" / f"sweep-{record['date']}.json"
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("| way | seconds | peak memory, MiB |\n|---|---:|---:|")
    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        seconds = statistics.median(run["seconds"] for run in own)
        print(f"| {way} | {seconds:.0f} | {max(run['peak_rss_bytes'] for run in own) / 2**20:,.0f} |")


if __name__ == "__main__":
    main()
