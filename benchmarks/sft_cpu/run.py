"""Measure Addenda and TRL with PEFT side by side: same rows, same weights, same kind of adapter, in turns.

    python benchmarks/sft_cpu/run.py                                   # the shop's rows, three repeats
    python benchmarks/sft_cpu/run.py --data train.jsonl --title gsm8k --rows 1000 --write-readme

Each contestant is a process of its own, so its peak memory is all that it needs: interpreter, libraries, model,
data and training. This script imports nothing heavy, because a child's peak counts what its parent held when it
was started.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import table
from child import run_child
from rows import SUPPORT, prepare

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
CONTESTANTS = {
    "trl": ["trl_peer.py"],
    "trl-packed": ["trl_peer.py", "--packing"],
    "trl-tuned": ["trl_peer.py", "--tuned"],
    "addenda": ["addenda_side.py"],
    "addenda-all": ["addenda_side.py", "--train-on", "all"],
    "addenda-small": ["addenda_side.py", "--packed", "smollm2-135m-instruct", "--micro-batch", "512"],
}
ROWS_PER_STEP = {"trl": 8, "addenda": 16, "addenda-all": 16, "addenda-small": 16}
PACKED_TOKENS_PER_STEP = 8 * 1024  # both packed ones
ATTEMPTS = 10
"""Runs of one contestant before giving up on a busy machine."""
BASE = "smollm2-135m-instruct"


def main() -> None:
    """Prepare the data, run every contestant in turns, write and print the results."""
    options = parse_options()
    if options.dtype == "auto":
        options.dtype = "bfloat16" if machine.multiplies_bfloat16() else "float32"
    if options.readme_from:
        earlier = json.loads(options.readme_from.read_text(encoding="utf-8"))
        table.write_readme(README, table.render(earlier))
        return
    with tempfile.TemporaryDirectory(prefix="addenda-bench-") as name:
        work = Path(name)
        prepared = prepare(options, work, BASE)
        document = open_document(options, prepared)
        for repeat in range(options.repeats):
            for contestant in options.contestants:
                document["runs"].append(measure(contestant, repeat, work, options, prepared))
    document["summary"] = table.summarize(document["runs"])
    print(table.render(document))
    path = options.out or default_path(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")
    if options.write_readme:
        table.write_readme(README, table.render(document))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SUPPORT, help="jsonl of chats or of question and answer")
    parser.add_argument("--title", help="what the results call the data; default: the file's name")
    parser.add_argument("--rows", type=int, default=1000, help="use the first so many rows")
    parser.add_argument("--tokens", type=int, default=12_000, help="least tokens timed per run")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts, at least 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=machine.describe()["cores"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the base, for every contestant; auto: bfloat16 where the processor multiplies it",
    )
    parser.add_argument("--quiet", type=float, default=0.1, help="share of the processors others may use")
    parser.add_argument(
        "--out", type=Path, help="result file; default: results/<date>-<data>-<processor>.json"
    )
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--readme-from", type=Path, help="only put an earlier result into README.md")
    return parser.parse_args()


def open_document(options: argparse.Namespace, prepared: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "sft_cpu",
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "base": {"name": BASE, "parameters": prepared["parameters"]},
        "adapter": "LoRA, rank 16, alpha 32, all linear layers but the output head",
        "data": prepared["data"],
        "settings": {
            name: getattr(options, name) for name in ("dtype", "tokens", "warmup", "repeats", "threads")
        },
        "runs": [],
    }


def steps_for(contestant: str, tokens: int, data: dict[str, Any]) -> int:
    """Optimiser steps of the contestant's own size that make up at least ``tokens``; at least two."""
    rows = ROWS_PER_STEP.get(contestant)
    a_step = PACKED_TOKENS_PER_STEP if rows is None else rows * data["tokens"] / data["rows"]
    return max(2, -int(-tokens // a_step))


def measure(
    contestant: str, repeat: int, work: Path, options: argparse.Namespace, prepared: dict[str, Any]
) -> dict[str, Any]:
    """Run one contestant once; again if other programs turned out to be busy meanwhile."""
    for attempt in range(ATTEMPTS):
        machine.wait_until_quiet(options.quiet)
        result = run_once(contestant, f"{contestant}-{repeat}-{attempt}", work, options, prepared)
        others = result["processors_used_by_others"]
        print(
            f"{result['tokens_per_second']:.0f} tokens/s, {result['peak_memory_bytes'] / 2**20:.0f} MiB"
            f", others used {others} processors",
            flush=True,
        )
        if others is None or others <= options.quiet * machine.describe()["cores"]:
            return {"contestant": contestant, "repeat": repeat, "discarded_before": attempt, **result}
    sys.exit(f"other programs were busy during {ATTEMPTS} runs of '{contestant}'; --quiet allows more")


def run_once(
    contestant: str, name: str, work: Path, options: argparse.Namespace, prepared: dict[str, Any]
) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    out, steps = work / f"{name}.json", steps_for(contestant, options.tokens, prepared["data"])
    script, *flags = CONTESTANTS[contestant]
    command = [sys.executable, str(HERE / script), *flags, "--model", prepared["folder"]]
    command += ["--data", str(work / "train.jsonl"), "--work", str(work / name), "--out", str(out)]
    command += ["--threads", str(options.threads), "--warmup", str(options.warmup), "--steps", str(steps)]
    command += ["--dtype", options.dtype]
    print(f"{name}: {steps} steps ...", end=" ", flush=True)
    usage = run_child(command, work / f"{name}.log", options.threads, {"CUDA_VISIBLE_DEVICES": ""})
    return {**json.loads(out.read_text(encoding="utf-8")), **usage}


def default_path(document: dict[str, Any]) -> Path:
    words = f"{document['data']['title']} {document['machine']['cpu']} {document['machine']['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-")
    return HERE / "results" / f"{document['date']}-{slug}.json"


if __name__ == "__main__":
    main()
