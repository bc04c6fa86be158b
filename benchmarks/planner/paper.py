"""On paper: what fits into 8 to 24 GiB, from 1 to 70 billion weights, by the planner's own figures; no weights needed.

    python benchmarks/planner/paper.py --write-readme

Each model is built by its shapes alone. What a token keeps is counted on one and two of its blocks at their true width.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

import addenda
from addenda.bases import formats
from addenda.bases.empty import empty_model
from addenda.bases.packed_layers import pack_linears
from addenda.kernels import enable
from addenda.recipe.planner import weight_bytes
from addenda.train.calibration import count_memory
from addenda.train.memory import MemoryModel

README = Path(__file__).resolve().parent / "README.md"
START, END = "<!-- paper: written by paper.py -->", "<!-- end of paper -->"
GIB = (8, 12, 16, 24)
PROGRAM = 450 * 2**20
"""Python, PyTorch and transformers, as the runs of run.py hold them."""
ROW = 512
"""Tokens that must run at once for a model to count as fitting: an ordinary conversation."""

LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128}
QWEN = {"model_type": "qwen2", "vocab_size": 152_064, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": {**LLAMA, "head_dim": 64, "hidden_size": 2048, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "intermediate_size": 8192, "tie_word_embeddings": True},
    "Llama 3.2 3B": {**LLAMA, "hidden_size": 3072, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "intermediate_size": 8192, "tie_word_embeddings": True},
    "Llama 3.1 8B": {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "intermediate_size": 14_336},
    "Qwen2.5 14B": {**QWEN, "hidden_size": 5120, "num_hidden_layers": 48,
                    "num_attention_heads": 40, "intermediate_size": 13_824},
    "Qwen2.5 32B": {**QWEN, "hidden_size": 5120, "num_hidden_layers": 64,
                    "num_attention_heads": 40, "intermediate_size": 27_648},
    "Llama 3.1 70B": {**LLAMA, "hidden_size": 8192, "num_hidden_layers": 80,
                      "num_attention_heads": 64, "intermediate_size": 28_672},
}  # fmt: skip


def main() -> None:
    """Count, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--write-readme", action="store_true")
    options = parser.parse_args()
    enable()
    lines = [
        "| model | weights | base, GiB | kept by a token, KiB | "
        + " | ".join(f"{gib} GiB" for gib in GIB)
        + " |",
        "|---|---|---:|---:|" + "---|" * len(GIB),
    ]
    for name in options.models:
        for line in rows(name):
            print(line, flush=True)
            lines.append(line)
    if options.write_readme:
        before, rest = README.read_text(encoding="utf-8").split(START)
        _, after = rest.split(END)
        README.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def rows(name: str) -> list[str]:
    """The lines of one model: its weights in bfloat16, and its linear layers as NF4."""
    shape = dict(SHAPES[name])
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    model = empty_model(transformers.AutoModelForCausalLM, config, torch.bfloat16)
    dense, billions = weight_bytes(model), sum(p.numel() for p in model.parameters()) / 1e9
    pack_linears(model, formats.get("NF4"), keep=model.get_output_embeddings())
    planned = addenda.plan(model, addenda.LoRA(rank=16), "all-linear")
    counted = count_memory(model, planned)
    found = []
    for weights, size in (("bfloat16", dense), ("nf4", weight_bytes(model))):
        memory = dataclasses.replace(counted, present=PROGRAM + size + planned.bytes)
        cells = " | ".join(cell(memory, gib) for gib in GIB)
        found.append(
            f"| {name} ({billions:.1f}B) | {weights} | {size / 2**30:.1f} "
            f"| {counted.kept_per_token / 2**10:,.0f} | {cells} |"
        )
    return found


def cell(memory: MemoryModel, gib: int) -> str:
    """How many tokens run at once with nothing run again, and the longest row with everything run again."""
    limit = gib * 2**30
    longest = memory.most_tokens(limit)
    if longest < ROW:
        return "no"
    freely = dataclasses.replace(memory, least_per_token=memory.kept_per_token).most_tokens(limit)
    return f"{freely:,} at once, rows to {longest:,}"


if __name__ == "__main__":
    main()
