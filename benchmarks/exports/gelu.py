"""How far llama.cpp's answers are from PyTorch's for Gemma 3 270M, and how much of it the table of GELU explains.

    python benchmarks/exports/gelu.py

The base alone, in float32 on both sides, with all blocks behind the first few made to add nothing: beside them PyTorch
with the exact GELU, and with the table that llama.cpp looks it up in.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import addenda
from addenda.export.gguf.copying import write_like
from addenda.export.gguf.origin import Exact, origin_of
from addenda.export.probes import answer, probes_of
from addenda.export.runtimes.gelu_table import with_gelu_table
from addenda.export.runtimes.llama_cpp import LlamaCpp

BLOCKS = (2, 3, 5, 9, 18)
ROWS = (0, 3, 6)


def main() -> None:
    base = addenda.load_base("gemma3-270m", dtype=torch.float32, weights="dense")
    rows = [probes_of(base).rows[number] for number in ROWS]
    kept = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    lines = []
    for blocks in BLOCKS:
        base.model.load_state_dict(kept)
        for block in base.model.model.layers[blocks:]:
            block.self_attn.o_proj.weight.data.zero_()
            block.mlp.down_proj.weight.data.zero_()
        with tempfile.TemporaryDirectory() as place:
            twin, origin = Path(place) / "base.gguf", origin_of(base)
            write_like(origin.path, twin, Exact(base.model, origin))
            with LlamaCpp(twin, exact=True, context=128, vocabulary=base.model.config.vocab_size) as runtime:
                found = list(runtime.answers(rows, "next-token"))
        exact = [answer(base.model, row, "next-token") for row in rows]
        with with_gelu_table(base.model):
            table = [answer(base.model, row, "next-token") for row in rows]
        lines.append({"blocks": blocks, "exact": apart(found, exact), "table": apart(found, table)})
        print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "gelu.json").write_text(json.dumps(lines, indent=1) + "\n")


def apart(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """The largest difference of each row, in nats, over the tokens that llama.cpp tells."""
    return [float((a - b)[~a.isnan()].abs().max()) for a, b in zip(found, wanted, strict=True)]


if __name__ == "__main__":
    main()
