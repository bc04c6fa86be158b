"""Hold the planner to its word: foretell and run some configurations, and compare peak memory and time.

    python benchmarks/planner/run.py --data gsm8k/train.jsonl --write-readme

Each configuration is a process of its own. It foretells with nothing loaded, as `addenda train` does, and then takes a
few steps; their time is compared by tokens a second, since the forecast is for all steps of the run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

import machine  # noqa: E402
import table  # noqa: E402

README = HERE / "README.md"
MEMORY, TIME, COVERAGE = 0.10, 0.20, 0.90
SMOLLM2, GEMMA3, QWEN2 = "smollm2-135m-instruct", "gemma3-270m", "qwen2.5-coder-0.5b-instruct"

CONFIGURATIONS: list[dict[str, Any]] = [
    {"base": base, "weights": weights, "characters": characters, "method": "lora", "rank": rank}
    for base, weights, characters, rank in [
        *itertools.product([SMOLLM2], ["dense", "packed"], [0, 2000, 6000], [4, 16, 64]),
        *itertools.product([GEMMA3], ["dense", "packed"], [0, 2000], [8, 32]),
        *itertools.product([QWEN2], ["dense", "packed"], [0, 2000], [16]),
    ]
]
CONFIGURATIONS += [
    {"base": SMOLLM2, "weights": weights, "characters": 0, "method": method, "rank": None}
    for weights, method in itertools.product(["dense", "nf4"], ["ia3", "bottleneck"])
]
CONFIGURATIONS += [
    {"base": SMOLLM2, "weights": "dense", "characters": 6000, "method": "lora", "rank": 16, "memory_gib": gib}
    for gib in (1.6, 2.0)
]
"""Rows of at least so many characters are made by joining rows of the data; 0 leaves them as they are."""


def main() -> None:
    """Run every configuration, write and print the table."""
    options = parse_options()
    document: dict[str, Any] = {
        "benchmark": "planner",
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(("addenda", "torch", "transformers")),
        "runs": [],
    }
    chosen = {n: c for n, c in enumerate(CONFIGURATIONS) if not options.only or n in options.only}
    if options.again:
        document = json.loads(options.again.read_text(encoding="utf-8"))
    path = options.again
    if path is None and not options.only:
        path = HERE / "results" / f"{document['date']}-{document['machine']['cores']}-cores.json"
        path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="addenda-planner-") as name:
        for number, configuration in chosen.items():
            run = {**configuration, **measure(configuration, options, Path(name), number)}
            print(row(run), flush=True)
            document["runs"][number : number + 1] = [run]
            if path is not None:  # after each, so that an end half-way loses nothing
                path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n" + render(document))
    if path is not None:
        print(f"\nwritten: {path}")
        if options.write_readme:
            table.write_readme(README, render(document))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="jsonl of question and answer")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps, the first not timed")
    parser.add_argument("--dtype", default=None, help="of the base; default: what suits the machine")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="replace what --only measures in this earlier result"
    )
    parser.add_argument("--write-readme", action="store_true")
    return parser.parse_args()


def measure(
    configuration: dict[str, Any], options: argparse.Namespace, work: Path, number: int
) -> dict[str, Any]:
    """Run one configuration in a process of its own."""
    data = joined(options.data, configuration["characters"], work)
    # About two micro-batches a step.
    rows = {0: 8, 2000: 3, 6000: 1}[configuration["characters"]]
    settings = {
        "base.source": configuration["base"],
        "base.weights": configuration["weights"],
        "base.dtype": options.dtype,
        "method.name": configuration["method"],
        "method.rank": configuration["rank"],
        "data.prompt": "question",
        "data.completion": "answer",
        "data.max_tokens": 2048,
        "data.overflow": "cut",
        "train.batch_size": rows,
        "train.max_steps": options.steps,
        "train.memory_gib": configuration.get("memory_gib"),
    }
    if configuration["base"] == GEMMA3:
        settings["base.template"] = "plain"
    out = work / f"{number}.json"
    command = [sys.executable, str(HERE / "one.py"), "--data", str(data), "--out", str(out)]
    command += ["--work", str(work / str(number))]
    command += [f"--set={key}={value}" for key, value in settings.items() if value is not None]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"failed": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def joined(path: Path, characters: int, work: Path) -> Path:
    """Write 200 rows of at least so many characters."""
    out = work / f"rows-{characters}.jsonl"
    if out.exists():
        return out
    rows, question, answer = [], "", ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            question, answer = f"{question}{row['question']} ", f"{answer}{row['answer']} "
            if len(question) + len(answer) >= characters:
                rows.append({"question": question.strip(), "answer": answer.strip()})
                question = answer = ""
            if len(rows) == 200:
                break
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


def off(run: dict[str, Any]) -> tuple[float, float]:
    """How far memory and speed are from what was foretold, as a share of what was measured."""
    foretold, rate = run["forecast"], run["tokens"] / run["seconds"]
    memory = foretold["ledger"]["total"] / run["peak_bytes"] - 1
    return memory, rate / foretold[
        "tokens_per_second"
    ] - 1  # positive: it was foretold to take longer than it did


def row(run: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in run:
        named = " | ".join(str(run[key]) for key in ("base", "weights", "method", "characters"))
        return f"| {named} | ended with: {run['failed']} |"
    memory, time = off(run)
    foretold = run["forecast"]
    rank = "" if run["rank"] is None else f" {run['rank']}"
    again = f", {foretold['recompute']} again" if foretold["recompute"] else ""
    return (
        f"| {run['base']} | {run['weights']} | {run['method']}{rank} | {run['characters'] or 'as they are'} "
        f"| {foretold['tokens_per_micro_batch']:,}{again} "
        f"| {foretold['ledger']['total'] / 2**20:,.0f} | {run['peak_bytes'] / 2**20:,.0f} | {memory:+.1%} "
        f"| {foretold['tokens_per_second']:,.0f} | {run['tokens'] / run['seconds']:,.0f} | {time:+.1%} |"
    )


def render(document: dict[str, Any]) -> str:
    """Return the table, and how often the planner kept its word."""
    about, runs = document["machine"], document["runs"]
    errors = [off(run) for run in runs if "failed" not in run]
    near = [sum(abs(e[n]) <= bound for e in errors) for n, bound in enumerate((MEMORY, TIME))]
    lines = [
        f"{about['cores']} cores of {about['cpu']}, {about['memory_gib']} GiB, {runs[0]['dtype']}, {document['date']}. "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        "",
        "| base | weights | method | characters of a row | tokens at once | MiB foretold | MiB measured | off by "
        "| tokens/s foretold | tokens/s measured | time off by |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
        *map(row, runs),
        "",
    ]
    for what, count, bound in (("peak memory", near[0], MEMORY), ("time", near[1], TIME)):
        met = "met" if count >= COVERAGE * len(runs) else "missed"
        lines.append(
            f"- {what} within {bound:.0%}: {count} of {len(runs)} configurations; target {COVERAGE:.0%} of them: {met}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
