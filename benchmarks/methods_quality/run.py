"""How good are the methods, each at its own best learning rate, over several seeds?

    python benchmarks/methods_quality/run.py banking77 --data FOLDER
    python benchmarks/methods_quality/run.py gsm8k --data FOLDER

Each run is a process of its own and one line of ``results/TASK.jsonl``; what is there already is not run again, so
the command goes on where it was stopped. ``table.py`` makes the README's tables.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from contenders import Contender, contenders
from tuning import best_rate, next_rate

HERE = Path(__file__).resolve().parent
TUNING_SEED, SEEDS = 0, (1, 2, 3)
FIRST = 1e-3
"""Where tuning begins for what names no rate."""
VERSIONS = {name: importlib.metadata.version(name) for name in ("addenda", "torch", "transformers")}


class Task(Protocol):
    """What a task offers; ``run`` is called in a child process each time."""

    name: str
    score: str
    device_name: str

    def run(self, contender: Contender, rate: float, seed: int, part: str) -> dict[str, Any]: ...


def loss_of(run: dict[str, Any]) -> float:
    """Return the loss that a run is judged by in tuning; nan where it failed."""
    return float(run.get("nll", math.nan))


class Results:
    """The lines of a task's file; each is written as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def runs(self, name: str, part: str) -> list[dict[str, Any]]:
        """Return the runs of a contender that were judged on a part."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        runs = [json.loads(line) for line in lines]
        return [run for run in runs if (run["name"], run["part"]) == (name, part)]

    def add(self, run: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


def in_child(task: Task, contender: Contender, rate: float, seed: int, part: str) -> dict[str, Any]:
    """Run in a forked process, so that the next run finds the base as it was, and memory is this run's alone."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, task, contender, rate, seed, part))
    child.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        found = {"error": "the process ended without a result"}
    child.join()
    if "broken" in found:
        raise SystemExit(f"the benchmark cannot go on: {found['broken']}")
    return found


def _child(out: Connection, task: Task, contender: Contender, rate: float, seed: int, part: str) -> None:
    try:
        found = task.run(contender, rate, seed, part)
    except ImportError as error:  # the code is changing under the run, or a package lacks: no method's doing
        found = {"broken": str(error)}
    except Exception as error:  # noqa: BLE001  (a method that fails is a result)
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    out.send(found)


def measure(task: Task, contender: Contender, results: Results) -> None:
    """Tune the rate of one contender, then run it with the other seeds."""

    def run(rate: float, seed: int, part: str) -> dict[str, Any]:
        found = {
            "name": contender.name,
            "method": contender.method,
            "settings": dict(contender.settings),
            "default_rate": contender.learning_rate(),
            "part": part,
            "rate": rate,
            "seed": seed,
            **in_child(task, contender, rate, seed, part),
            "device": task.device_name,
            "date": datetime.date.today().isoformat(),
            "versions": VERSIONS,
        }
        results.add(found)
        told = found.get("error") or f"{task.score} {found[task.score]:.4f}, {found['cpu_seconds']:.1f} s"
        print(f"{contender.name} {rate:g} {part} seed {seed}: {told}", file=sys.stderr, flush=True)
        return found

    losses = {known["rate"]: loss_of(known) for known in results.runs(contender.name, "validation")}
    first = contender.learning_rate() or FIRST
    while (rate := next_rate(losses, first=first)) is not None:
        losses[rate] = loss_of(run(rate, TUNING_SEED, "validation"))
    best = best_rate(losses)
    if best is None:
        return
    done = {(known["rate"], known["seed"]) for known in results.runs(contender.name, "test")}
    for seed in SEEDS:
        if (best, seed) not in done:
            run(best, seed, "test")


def measure_all(task: Task, chosen: Sequence[Contender], results: Results, jobs: int) -> None:
    """Measure contenders in turn, or so many at a time, each by the next process that is free."""
    if jobs == 1:
        for contender in chosen:
            measure(task, contender, results)
        return
    context = multiprocessing.get_context("fork")
    next_one = context.Value("i", 0)

    def work() -> None:
        while True:
            with next_one.get_lock():
                number, next_one.value = next_one.value, next_one.value + 1
            if number >= len(chosen):
                return
            measure(task, chosen[number], results)

    workers = [context.Process(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process ended before its work was done")


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("banking77", "gsm8k"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's rows")
    parser.add_argument("--model", type=Path, help="folder of the base, where it is not found by itself")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders, instead of all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; gsm8k alone can use a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="contenders measured at a time")
    options = parser.parse_args()
    every = {contender.name: contender for contender in contenders(options.task)}
    if unknown := set(options.only or ()) - set(every):
        raise SystemExit(f"no contender: {', '.join(sorted(unknown))}; there are: {'; '.join(every)}")
    chosen = [every[name] for name in options.only or every]
    torch.set_num_threads(1)
    if options.task == "banking77":
        from banking77 import Banking77

        if options.device != "cpu":
            parser.error("banking77 is measured on the CPU")
        task: Task = Banking77(options.data, options.model)
    else:
        from gsm8k import GSM8K

        task = GSM8K(options.data, options.model, options.device)
    results = Results(HERE / "results" / f"{task.name}.jsonl")
    measure_all(task, chosen, results, options.jobs)


if __name__ == "__main__":
    main()
