"""Make the README's tables of the raw results.

python benchmarks/methods_quality/table.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import contenders
from tuning import best_rate

__all__ = ["interval", "render", "summaries"]

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % quantile of Student's t, by the number of runs."""
SCORES = {"banking77": "accuracy", "gsm8k": "nll"}
FEWEST = 3
"""Test runs that a method needs to be in the table."""
REFERENCE = "lora"
"""What the others are compared with, seed by seed."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval by Student's t; nan where it is of one run."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def summaries(runs: Sequence[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    """Return what is known of each contender whose test runs are there, in the order of measuring."""
    made = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        tuning = {run["rate"]: run.get("nll", math.nan) for run in own if run["part"] == "validation"}
        best = best_rate(tuning)
        test = [r for r in own if r["part"] == "test" and r["rate"] == best and score in r]
        made.append({"name": name, "best": best, "tuning": tuning, "test": test, "any": own[0]})
    return made


def difference(one: dict[str, Any], other: dict[str, Any], score: str) -> tuple[float, float] | None:
    """Return the mean of the differences between runs of one seed, and half its interval; None for too few."""
    known = {run["seed"]: run[score] for run in other["test"]}
    pairs = [run[score] - known[run["seed"]] for run in one["test"] if run["seed"] in known]
    return interval(pairs) if len(pairs) > 1 else None


def render(task: str, runs: Sequence[dict[str, Any]], every: Sequence[str]) -> str:
    """Return the table of a task and what is missing in it.

    Args:
        task: its name.
        runs: the lines of its results.
        every: the names of all contenders.
    """
    score, found = SCORES[task], summaries(runs, SCORES[task])
    done = [each for each in found if len(each["test"]) >= FEWEST]
    sign = -1.0 if score == "accuracy" else 1.0
    done.sort(key=lambda each: sign * interval([run[score] for run in each["test"]])[0])
    reference = next((each for each in done if each["name"] == REFERENCE), None)
    moved = ("cosine", "rank") if task == "banking77" else ("KL", "agreement")
    unit, also = (", %", " nll against LoRA |") if score == "accuracy" else (", nats", "")
    lines = [
        f"| method | parameters | rate (its own) | {score}{unit} | against LoRA |{also} time, s | attaching, s "
        f"| memory, MB | {moved[0]} | {moved[1]} |",
        f"|---|---:|---:|---:|---:|{'---:|' if also else ''}---:|---:|---:|---:|---:|",
        *(_row(each, reference, score) for each in done),
    ]
    failed = [each["name"] for each in found if each["best"] is None]
    begun = {each["name"] for each in done} | set(failed)
    missing = [name for name in every if name not in begun]
    lines += ["", f"Measured: {len(done)} of {len(every)}."]
    if failed:
        lines += ["", f"Failed at every rate: {', '.join(failed)}."]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return "\n".join(lines)


def _row(each: dict[str, Any], reference: dict[str, Any] | None, score: str) -> str:
    runs, first = each["test"], each["any"]
    settings = ", ".join(f"{key} {value}" for key, value in first["settings"].items())
    own = "" if first["default_rate"] is None else f" ({first['default_rate']:g})"
    scale = 100.0 if score == "accuracy" else 1.0
    other = None if each is reference else reference
    digits = 1 if score == "accuracy" else 3

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    told = [
        f"{each['name']}{f' ({settings})' if settings else ''}",
        f"{runs[0]['parameters']:,}",
        f"{each['best']:g}{own}",
        _with_interval(interval([run[score] * scale for run in runs]), digits),
        _against(each, other, score, scale, digits),
        *([_against(each, other, "nll", 1.0, 3)] if score == "accuracy" else []),
        f"{mean('cpu_seconds'):.1f}",
        f"{mean('attach_seconds'):.1f}",
        f"{mean('peak_bytes') / 1e6:.0f}",
        *(f"{mean(key):.3f}" for key in ("cosine", "spearman", "kl", "agreement") if key in runs[0]),
    ]
    return f"| {' | '.join(told)} |"


def _against(
    each: dict[str, Any], other: dict[str, Any] | None, score: str, scale: float, digits: int
) -> str:
    known = None if other is None else difference(each, other, score)
    return "" if known is None else _with_interval((known[0] * scale, known[1] * scale), digits, sign="+")


def _with_interval(known: tuple[float, float], digits: int, *, sign: str = "") -> str:
    return f"{known[0]:{sign}.{digits}f} ± {known[1]:.{digits}f}"


def main() -> None:
    """Write every task's table between its marks."""
    text = README.read_text(encoding="utf-8")
    for task in SCORES:
        path = HERE / "results" / f"{task}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        names = [contender.name for contender in contenders(task)]
        start, end = f"<!-- {task}: written by table.py -->", f"<!-- end of {task} -->"
        before, rest = text.split(start)
        table = render(task, [json.loads(line) for line in lines], names)
        text = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
        print(table)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
