"""What does training on packed weights cost in speed, and what does it save in memory?

    python benchmarks/packed_base/run.py

For each base, dense and packed in turns, each in a process of its own; then the 0.5B base, packed, with 512 tokens at
once. Models are fetched as packages and converted once before anything is measured.
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

from addenda.bases import list_models

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

import table  # noqa: E402

README = HERE / "README.md"
BASES = ("smollm2-135m-instruct", "gemma3-270m", "qwen2.5-coder-0.5b-instruct")
SMALL = ("qwen2.5-coder-0.5b-instruct", 512)
SPEED_TARGET, WEIGHTS_TARGET, PEAK_TARGET = 0.9, 1.1, 1.5e9


def run_step(
    base: str, weights: str, options: argparse.Namespace, tokens: int, *, recompute: bool = False
) -> dict[str, Any]:
    """Measure one contestant in a new process."""
    command = [sys.executable, str(HERE / "step.py"), base, weights, "--dtype", options.dtype]
    for name, value in (("tokens", tokens), ("steps", options.steps), ("threads", options.threads)):
        command += [f"--{name}", str(value)]
    command += ["--recompute"] * recompute
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{base}, {weights}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    run = {"base": base, "tokens": tokens, **found}
    run["tokens_per_second"] = tokens / statistics.median(found["seconds"])
    print(f"{base} {weights} {tokens}: {run['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    return run


def compared(base: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and ratios of one base."""
    by_form = {
        form: [r for r in runs if r["base"] == base and r["weights"] == form] for form in ("dense", "packed")
    }
    speed = {form: statistics.median(r["tokens_per_second"] for r in own) for form, own in by_form.items()}
    peak = {form: statistics.median(r["peak_bytes"] for r in own) for form, own in by_form.items()}
    held = {form: own[0]["weight_bytes"] for form, own in by_form.items()}
    file_bytes = next(card.bytes for card in list_models() if card.name == base)
    return {
        "base": base,
        "file_bytes": file_bytes,
        "tokens_per_second": speed,
        "speed_ratio": speed["packed"] / speed["dense"],
        "weight_bytes": held,
        "weights_to_file": held["packed"] / file_bytes,
        "peak_bytes": peak,
    }


def render(document: dict[str, Any]) -> str:
    """Return the table, and each target with whether it was met."""
    settings = document["settings"]
    lines = [
        f"{settings['tokens']:,} tokens per micro-batch, {settings['dtype']}, {settings['threads']} threads, median of "
        f"{settings['repeats']} turns of {settings['steps']} steps; {document['date']}, {document['cpu']}.",
        "",
        "| base | dense, tokens/s | packed, tokens/s | ratio | dense weights, MB | packed weights, MB | to the file "
        "| dense peak, MB | packed peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["summary"]:
        speed, held, peak = row["tokens_per_second"], row["weight_bytes"], row["peak_bytes"]
        lines.append(
            f"| {row['base']} | {speed['dense']:.0f} | {speed['packed']:.0f} | {row['speed_ratio']:.2f} "
            f"| {held['dense'] / 1e6:.0f} | {held['packed'] / 1e6:.0f} | {row['weights_to_file']:.3f} "
            f"| {peak['dense'] / 1e6:.0f} | {peak['packed'] / 1e6:.0f} |"
        )
    small = document["small"]
    lines += [
        "",
        *(_verdict(f"{row['base']}: speed {row['speed_ratio']:.2f} of dense, target {SPEED_TARGET}",
                   met=row["speed_ratio"] >= SPEED_TARGET) for row in document["summary"]),
        *(_verdict(f"{row['base']}: weights {row['weights_to_file']:.3f} of the file, target {WEIGHTS_TARGET}",
                   met=row["weights_to_file"] <= WEIGHTS_TARGET) for row in document["summary"]),
        _verdict(
            f"{small['base']} with {small['tokens']} tokens at once: peak {small['peak_bytes'] / 1e9:.2f} GB, "
            f"target under {PEAK_TARGET / 1e9:g} GB",
            met=small["peak_bytes"] < PEAK_TARGET,
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _verdict(text: str, *, met: bool) -> str:
    return f"- {text}: {'met' if met else 'missed'}"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every contestant in turns; return the document."""
    runs = []
    for _ in range(options.repeats):
        for base in options.bases:
            runs += [run_step(base, form, options, options.tokens) for form in ("dense", "packed")]
    small = run_step(SMALL[0], "packed", options, SMALL[1], recompute=True)
    versions = {name: importlib.metadata.version(name) for name in ("addenda", "torch", "transformers")}
    return {
        "benchmark": "packed_base",
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "settings": {
            name: getattr(options, name) for name in ("tokens", "steps", "repeats", "threads", "dtype")
        },
        "versions": {"python": platform.python_version()} | versions,
        "runs": runs,
        "summary": [compared(base, runs) for base in options.bases],
        "small": small,
    }


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
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
