"""Write the table of benchmarks/exports/results/gate.jsonl into the README; with a path, print that file's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HEADS = (
    "base", "export", "MB", "exact twin: largest difference (limit)", "KL of the file, nats", "same first choice",
    "change kept, size", "cosine", "loaded with", "verdict",
)  # fmt: skip
BASES = ("smollm2", "gemma", "all-minilm", "efficientnet")


def main() -> None:
    if len(sys.argv) > 1:
        print(table(Path(sys.argv[1])))
        return
    readme = HERE / "README.md"
    marked = re.compile(r"(?<=<!-- results -->\n).*?(?=\n<!-- end of results -->)", re.DOTALL)
    text = marked.sub(lambda _: table(HERE / "results" / "gate.jsonl"), readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")


def table(path: Path) -> str:
    """Return the latest line of each export, as Markdown."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    latest = {(line["base"], named(line)): line for line in lines}
    ordered = sorted(latest.values(), key=lambda line: (place(line["base"]), line["base"], named(line)))
    rows = [HEADS, ["---"] * len(HEADS), *map(cells, ordered)]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)


def place(base: str) -> int:
    return next((number for number, name in enumerate(BASES) if base.startswith(name)), len(BASES))


def named(line: dict[str, Any]) -> str:
    return f"{line['format']} {line['type']}".rstrip()


def cells(line: dict[str, Any]) -> list[str]:
    gate = line.get("parity")
    if gate is None:  # it did not come so far
        because = line["where"].get("because", "")
        return [line["base"], named(line), *[""] * 7, f"{line['error']}: {because}".rstrip(": ")]
    real, twin = gate["real"] or {}, gate["twin"] or {}
    top1 = real.get("top1_agreement")
    return [
        line["base"],
        named(line),
        f"{line['bytes'] / 1e6:.1f}",
        f"{twin['largest_difference']:.1g} ({twin['limit']:.1g})" if twin else "",
        estimate(real.get("kl"), ".2g"),
        "" if top1 is None else f"{top1:.1%}",
        estimate(real.get("effect_size"), ".3f"),
        estimate(real.get("effect_cosine"), ".3f"),
        real.get("runtime", ""),
        gate["verdict"],
    ]


def estimate(found: dict[str, Any] | None, form: str) -> str:
    if not found:
        return ""
    if found["low"] is None:
        return f"{found['value']:{form}}"
    return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


if __name__ == "__main__":
    main()
