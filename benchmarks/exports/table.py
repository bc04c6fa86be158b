"""The table of benchmarks/exports/results/gate.jsonl, in Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def share(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results") / "gate.jsonl"
    heads = (
        "base", "export", "MB", "exact twin: largest difference", "KL of the file", "same first choice",
        "change kept, size", "cosine", "verdict",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for text in path.read_text().splitlines():
        line = json.loads(text)
        name = line["format"] + (f" {line['type']}" if line["type"] else "")
        if "error" in line:
            print(f"| {line['base']} | {name} | | | | | | | {line['error']} |")
            continue
        gate = line["parity"]
        real, twin = gate["real"] or {}, gate["twin"] or {}
        kl = real.get("kl")
        top1 = real.get("top1_agreement")
        cells = [
            line["base"],
            name,
            f"{line['bytes'] / 1e6:.1f}",
            f"{twin['largest_difference']:.1g}" if twin else "",
            f"{kl['value']:.2g}" if kl else "",
            "" if top1 is None else f"{top1:.1%}",
            share(real.get("effect_size")),
            share(real.get("effect_cosine")),
            gate["verdict"],
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
