"""How long does it take to switch between adapters, with 1 to 100 of them loaded?

    python benchmarks/switching/run.py --write-readme

Addenda's ``activate`` and PEFT's ``set_adapter`` on SmolLM2-135M-Instruct, LoRA of rank 4 on all linear layers.
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
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
START, END = "<!-- results: written by run.py -->", "<!-- end of results -->"
COUNTS = (2, 10, 100)
SWITCHES = 50


def measure(contestant: str, count: int) -> dict[str, Any]:
    """Load adapters, and time switches from one to another; called in a process of its own."""
    import torch

    import addenda

    torch.manual_seed(0)
    base = addenda.load_base("smollm2-135m-instruct", dtype=torch.float32)
    names = [f"a{number}" for number in range(count)]
    if contestant == "addenda":
        for name in names:
            addenda.attach(base.model, addenda.LoRA(rank=4), name=name)
            addenda.activate(base.model, [])
        switch = lambda name: addenda.activate(base.model, name)  # noqa: E731
    else:
        import peft

        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(base.model, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        switch = model.set_adapter
    taken = []
    for turn in range(SWITCHES + 1):
        started = time.perf_counter()
        switch(names[turn % count])
        taken.append(time.perf_counter() - started)
    return {"contestant": contestant, "count": count, "seconds": taken[1:]}


def main() -> None:
    """Run every contestant with every number of adapters, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "COUNT"))
    parser.add_argument("--write-readme", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    runs = []
    for count in COUNTS:
        for contestant in ("addenda", "peft"):
            command = [sys.executable, __file__, "--one", contestant, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    table = as_table(runs)
    print(table)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            name: importlib.metadata.version(name) for name in ("addenda", "torch", "peft", "transformers")
        },
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
    """Medians in milliseconds, the slowest of each in brackets."""
    lines = ["| adapters loaded | Addenda, ms (slowest) | PEFT, ms (slowest) |", "|---:|---:|---:|"]
    for count in COUNTS:
        cells = []
        for contestant in ("addenda", "peft"):
            [seconds] = [r["seconds"] for r in runs if r["contestant"] == contestant and r["count"] == count]
            cells.append(f"{1e3 * statistics.median(seconds):.3f} ({1e3 * max(seconds):.3f})")
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
