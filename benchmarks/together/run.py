"""Several adapters trained in one pass, or one after another: how long, and in how much memory?

    python benchmarks/together/run.py --data train.jsonl --write-readme

Adapters of SmolLM2-135M-Instruct, LoRA of rank 16 on all linear layers, each on rows of its own. Each way is a process
of its own, in turns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import resource
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

README = HERE / "README.md"
START, END = "<!-- results: written by run.py -->", "<!-- end of results -->"
ROWS = 32
"""Rows of each adapter: two steps of 16."""


def measure(way: str, data_file: str, adapters: int) -> dict[str, Any]:
    """Train every adapter, and return the seconds of training and the peak memory; called in a process of its own."""
    import torch

    import addenda
    from addenda import data, train
    from addenda.train.together import Job, train_together

    base = addenda.load_base("smollm2-135m-instruct", dtype=torch.float32)
    encoder = data.Encoder(base.tokenizer, base.chat_template, "assistant", max_tokens=1024, overflow="cut")
    rows = data.encode_rows(data.read_dataset(data_file).require_clean().conversations, encoder).examples
    config = train.TrainConfig(epochs=1, batch_size=16, save_every_minutes=None)
    own = [rows[number * ROWS : (number + 1) * ROWS] for number in range(adapters)]
    with tempfile.TemporaryDirectory() as work:
        if way == "together":
            handles = [
                addenda.attach(base.model, addenda.LoRA(rank=16), name=f"a{n}", seed=n)
                for n in range(adapters)
            ]
            jobs = [
                Job(handle, part, config, Path(work) / handle.name, lambda _: None)
                for handle, part in zip(handles, own, strict=True)
            ]
            started = time.monotonic()
            train_together(base, jobs)
            seconds = time.monotonic() - started
        else:
            seconds = 0.0
            for number, part in enumerate(own):
                handle = addenda.attach(base.model, addenda.LoRA(rank=16), name=f"a{number}", seed=number)
                started = time.monotonic()
                train.train(
                    base, handle, part, [], config, run_dir=Path(work) / handle.name, on_event=lambda _: None
                )
                seconds += time.monotonic() - started
                handle.detach()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"way": way, "adapters": adapters, "seconds": seconds, "peak_memory_bytes": peak}


def main() -> None:
    """Run both ways in turns with every number of adapters, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="jsonl of chats or of question and answer")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "ADAPTERS"))
    parser.add_argument("--write-readme", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], options.data, int(options.one[1]))))
        return
    with tempfile.TemporaryDirectory() as work:
        chats = Path(work) / "chats.jsonl"
        lines = first_lines(Path(options.data), ROWS * max(options.adapters))
        chats.write_text(
            "".join(json.dumps(as_chat(json.loads(line))) + "\n" for line in lines), encoding="utf-8"
        )
        report(measured(str(chats), options), options)


def measured(chats: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every way with every number of adapters, in turns."""
    runs = []
    for _ in range(options.repeats):
        for adapters in options.adapters:
            for way in ("together", "apart"):
                command = [sys.executable, __file__, "--data", chats, "--one", way, str(adapters)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(runs[-1], flush=True)
    return runs


def report(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, keep the runs, and write the README if asked."""
    table = as_table(runs)
    print(table)
    names = ("addenda", "torch", "transformers")
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "runs": runs,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{record['date']}.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    if options.write_readme:
        text = README.read_text(encoding="utf-8")
        before, _, rest = text.partition(START)
        README.write_text(f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def as_table(runs: list[dict[str, Any]]) -> str:
    """Medians of seconds and of peak memory."""
    lines = [
        "| adapters | together, s | one after another, s | ratio of times | together, MiB | apart, MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for adapters in sorted({run["adapters"] for run in runs}):
        found = {}
        for way in ("together", "apart"):
            own = [run for run in runs if run["adapters"] == adapters and run["way"] == way]
            found[way] = (
                statistics.median(run["seconds"] for run in own),
                statistics.median(run["peak_memory_bytes"] for run in own) / 2**20,
            )
        (t, tm), (a, am) = found["together"], found["apart"]
        lines.append(f"| {adapters} | {t:.1f} | {a:.1f} | {t / a:.2f}x | {tm:,.0f} | {am:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
