"""The results as a table: medians over the repeats, each beside its range, and ratios against the peer."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["keep", "render", "row", "summarize", "write_readme"]

START, END = "<!-- results: written by run.py -->", "<!-- end of results -->"
LABELS = {
    "trl": "TRL + PEFT, default",
    "trl-packed": "TRL + PEFT, `packing=True`",
    "trl-tuned": "TRL + PEFT, packed, tuned by hand",
    "addenda": "Addenda, default",
    "addenda-all": "Addenda, loss on every token",
    "addenda-small": "Addenda, packed base, 512 tokens at once",
}
TARGETS = {"trl": (5.0, 0.2), "trl-packed": (3.5, 0.5)}
"""Least ratio of the speeds and largest ratio of the peaks, by peer."""


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians of speed and peak memory per contestant, and how Addenda compares to each other one."""
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(run["contestant"] for run in runs):
        own = [run for run in runs if run["contestant"] == name]
        rows[name] = {
            field: statistics.median(run[field] for run in own)
            for field in ("tokens_per_second", "peak_memory_bytes")
        }
        rows[name]["tokens_per_second_range"] = _range(own, "tokens_per_second")
        rows[name]["peak_memory_bytes_range"] = _range(own, "peak_memory_bytes")
    ratios = {f"{ours} / {peer}": _ratio(rows[ours], rows[peer]) for ours, peer in _pairs(rows)}
    return {"contestants": rows, "ratios": ratios}


def render(document: dict[str, Any]) -> str:
    """Return the Markdown table with what it was measured on, and each target with whether it was met."""
    summary, about, data = document["summary"], document["machine"], document["data"]
    settings = document["settings"]
    lines = [
        f"{data['title']}: {data['rows']:,} rows, {data['tokens_per_row']['mean']:.0f} tokens each on average "
        f"(longest {data['tokens_per_row']['longest']}), {data['share_of_tokens_in_answers']:.0%} of them in answers. "
        f"{about['cores']} cores of {about['cpu']} ({', '.join(about['cpu_features'])}), {about['memory_gib']} GiB; "
        f"{settings['dtype']}; {settings['threads']} threads; median of {settings['repeats']} alternating runs, "
        f"range in brackets; {document['date']}. "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        "",
        "| contestant | tokens/s | peak memory, MiB | speed of Addenda to it | memory of Addenda to it |",
        "|---|---:|---:|---:|---:|",
    ]
    ratios = summary["ratios"]
    rows = summary["contestants"].items()
    lines += [row(LABELS[name], figures, ratios.get(f"addenda / {name}")) for name, figures in rows]
    return "\n".join([*lines, "", *_verdicts(ratios)])


def keep(document: dict[str, Any], path: Path, readme: Path, rendered: str) -> None:
    """Write a result to its file, and print its table and put it into a README."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(rendered)
    write_readme(readme, rendered)


def write_readme(readme: Path, rendered: str) -> None:
    """Put the table between the two marks in a README."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    readme.write_text(f"{before}{START}\n{rendered}\n{END}{after}", encoding="utf-8")
    print(f"written: {readme}")


def _range(runs: list[dict[str, Any]], field: str) -> list[float]:
    values = [run[field] for run in runs]
    return [min(values), max(values)]


def _pairs(rows: dict[str, Any]) -> list[tuple[str, str]]:
    peers = [name for name in rows if not name.startswith("addenda")]
    return [(ours, peer) for ours in rows if ours.startswith("addenda") for peer in peers]


def _ratio(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    return {
        "speed": round(ours["tokens_per_second"] / peer["tokens_per_second"], 2),
        "memory": round(ours["peak_memory_bytes"] / peer["peak_memory_bytes"], 3),
    }


def row(label: str, figures: dict[str, Any], ratio: dict[str, float] | None) -> str:
    """Return the table's row of one contestant, with Addenda's ratios to it where there are some."""
    slow, fast = figures["tokens_per_second_range"]
    small, large = (value / 2**20 for value in figures["peak_memory_bytes_range"])
    compared = f"{ratio['speed']:.2f}x | {ratio['memory']:.2f}x" if ratio else " | "
    return (
        f"| {label} | {figures['tokens_per_second']:.0f} ({slow:.0f} to {fast:.0f}) "
        f"| {figures['peak_memory_bytes'] / 2**20:.0f} ({small:.0f} to {large:.0f}) | {compared} |"
    )


def _verdicts(ratios: dict[str, Any]) -> list[str]:
    lines = []
    for ours, (peer, (least, largest)) in itertools.product(("addenda", "addenda-small"), TARGETS.items()):
        if ratio := ratios.get(f"{ours} / {peer}"):
            speed = "met" if ratio["speed"] >= least else "missed"
            memory = "met" if ratio["memory"] <= largest else "missed"
            lines.append(
                f"- {LABELS[ours]} against {LABELS[peer]}: speed {ratio['speed']:.2f}x, target {least:g}x: {speed}; "
                f"memory {ratio['memory']:.2f}x, target at most {largest:g}x: {memory}"
            )
    return lines
