"""Several GGUF adapters over one base in llama.cpp: what each takes on disk, and what it costs to change between them.

    python benchmarks/exports/switching.py [--adapters 4] [--rounds 20]

Random LoRA of rank 16 on all linear layers of SmolLM2-135M-Instruct. A request reads a prompt of 24 tokens and writes
one; with the same adapter as before, or another. llama.cpp reads the prompt anew for another adapter, so both are given
without a cache too: the rest is the change itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import addenda
from addenda.bases.gguf_origin import gguf_of
from addenda.export.gguf.adapter import write_adapter
from addenda.export.gguf.origin import origin_of
from addenda.export.runtimes.llama_cpp import LlamaCppWithAdapter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    base = addenda.load_base("smollm2-135m-instruct")
    file = gguf_of(base)
    assert file is not None
    with tempfile.TemporaryDirectory() as place:
        files = [written(base, Path(place) / f"{number}.gguf", number) for number in range(options.adapters)]
        vocabulary = len(base.tokenizer)
        with LlamaCppWithAdapter(file, files, exact=False, context=256, vocabulary=vocabulary) as server:
            figures = {
                f"{'another' if change else 'the same'} adapter, prompt {'kept' if keep else 'read anew'}": timed(
                    server, options, change=change, keep=keep
                )
                for change in (False, True)
                for keep in (True, False)
            }
        print(
            json.dumps(
                {
                    "base_mb": round(file.stat().st_size / 1e6, 1),
                    "adapter_mb": round(files[0].stat().st_size / 1e6, 1),
                    "median_ms": figures,
                },
                indent=1,
            )
        )


def written(base: addenda.LoadedBase, path: Path, seed: int) -> Path:
    handle = addenda.attach(base.model, addenda.LoRA(rank=16), seed=seed)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.02)
    write_adapter(handle, origin_of(base), path)
    handle.detach()
    return path


def timed(server: LlamaCppWithAdapter, options: Any, *, change: bool, keep: bool) -> float:
    ids, taken = list(range(300, 324)), []
    for number in range(options.rounds + 1):
        chosen = number % options.adapters if change else 0
        body = {
            "prompt": ids,
            "n_predict": 1,
            "cache_prompt": keep,
            "id_slot": 0,
            "lora": [{"id": each, "scale": float(each == chosen)} for each in range(options.adapters)],
        }
        started = time.perf_counter()
        server.post("/completion", body)
        taken.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(taken[1:]), 1)


if __name__ == "__main__":
    main()
