"""What was trained through a format, as the file that llama.cpp loads: does it answer as the trained model?

    python benchmarks/through/shipped.py --adapters FOLDER

The folder is the one where ``run.py`` keeps trained adapters. One JSON line an export, in ``results/shipped.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import addenda
from addenda.export.run import export_adapter

KINDS = ("Q4_1", "Q4_0")


def main() -> None:
    """Export each kind of the first seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=Path, required=True, help="folder where run.py keeps adapters")
    parser.add_argument("--rate", default="0.004")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS:
        base = addenda.load_base("smollm2-135m-instruct", weights="packed", dtype=torch.float32)
        handle = addenda.load(base.model, options.adapters / f"{kind}-{options.rate}-1")
        with tempfile.TemporaryDirectory() as place:
            parity = export_adapter(base, handle, "gguf", f"{place}/out", type=kind.lower(), allow_drift=True)
            size = Path(place, "out", "model.gguf").stat().st_size
        line = {"kind": kind, "rate": options.rate, "bytes": size, "parity": parity.document()}
        with (Path(__file__).parent / "results" / "shipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(kind, parity, flush=True)


if __name__ == "__main__":
    main()
