"""Make the README's tables of the raw results.

python benchmarks/through/table.py
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STUDENT = {2: 12.706, 3: 4.303}
"""The 97.5 % quantile of Student's t, by the number of runs."""


def spread(values: Sequence[float], places: int) -> str:
    """Return the mean and half the width of its 95 % interval; the value alone where there is one."""
    mean = f"{statistics.fmean(values):.{places}f}"
    if len(values) < 2:
        return mean
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{places}f}"


def models(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table of what each model makes of the test rows."""
    by_seed = {(run["seed"], run["name"]): run for run in runs}
    lines = [
        "| model | seeds | nll | gain kept, % | right answers, % | KL, nats | file, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        kept = []
        for run in own:
            base, best = (by_seed[run["seed"], other]["nll"] for other in ("base", "unmerged"))
            kept.append(100 * (base - run["nll"]) / (base - best))
        cells = [
            spread([run["nll"] for run in own], 3),
            spread(kept, 1),
            spread([100 * run["exact"] for run in own], 1),
            "-" if name == "unmerged" else f"{statistics.fmean(run['kl'] for run in own):.2g}",
            f"{statistics.fmean(run['bytes'] for run in own) / 1e6:.1f}",
        ]
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(found: dict[str, Any]) -> str:
    """Return the table of what a step costs."""
    lines = [
        "| weights | tokens at once | layers | through | seconds | of a plain step |",
        "|---|---:|---|---|---:|---:|",
    ]
    for step in found["steps"]:
        lines.append(
            f"| {step['weights']} | {step['tokens']:,} | {step['targets']} | {step['through']} | "
            f"{step['seconds']:.2f} | {step['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the tables between their marks."""
    runs = [
        json.loads(line) for line in (HERE / "results/runs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tables = {"models": models(runs)}
    cost = HERE / "results/cost.json"
    if cost.exists():
        tables["cost"] = costs(json.loads(cost.read_text(encoding="utf-8")))
    page = (HERE / "README.md").read_text(encoding="utf-8")
    for name, table in tables.items():
        page = re.sub(
            rf"(<!-- {name}: [^\n]*\n).*?(<!-- end -->)",
            lambda m, t=table: f"{m[1]}{t}\n{m[2]}",
            page,
            flags=re.S,
        )
    (HERE / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
