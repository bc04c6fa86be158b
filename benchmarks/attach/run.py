"""How long does it take to put LoRA on every linear layer of a 7-billion-parameter Llama? Ours beside PEFT's.

    python benchmarks/attach/run.py

The model is built on the meta device: its layers are real, its weights take no memory, so only the work of attaching
is timed. Each repeat builds a new model; building is not timed. The contestants take turns.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import addenda

HERE = Path(__file__).resolve().parent
TARGET_SECONDS = 1.0


def llama() -> nn.Module:
    """Build Llama-2-7B's layers without weights."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def attach_ours(model: nn.Module) -> int:
    """Attach with Addenda; return the number of trained parameters."""
    return addenda.attach(model, addenda.LoRA(rank=16), "all-linear").trainable_parameters


def attach_peft(model: Any) -> int:
    """Attach with PEFT; return the number of trained parameters."""
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def timed(attach: Callable[[nn.Module], int]) -> tuple[float, int]:
    """Return the seconds that one attaching took, and the parameters it made."""
    model = llama()
    gc.collect()
    started = time.perf_counter()
    parameters = attach(model)
    return time.perf_counter() - started, parameters


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="result file; default: results/<date>.json")
    options = parser.parse_args()
    contestants = {"addenda": attach_ours, "peft": attach_peft}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    parameters: dict[str, int] = {}
    for attach in contestants.values():  # the first call pays for imports
        timed(attach)
    for _ in range(options.repeats):
        for name, attach in contestants.items():
            taken, parameters[name] = timed(attach)
            seconds[name].append(round(taken, 4))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    date = datetime.date.today().isoformat()
    document = {
        "benchmark": "attach",
        "date": date,
        "question": "seconds to attach LoRA rank 16 to all linear layers of a 7B Llama on the meta device",
        "model_parameters": sum(p.numel() for p in llama().parameters()),
        "trainable_parameters": parameters,
        "seconds": seconds,
        "median_seconds": medians,
        "target": f"addenda under {TARGET_SECONDS:g} s",
        "target_met": medians["addenda"] < TARGET_SECONDS,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("addenda", "torch", "transformers", "peft")},
    }
    path = options.out or HERE / "results" / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, median in medians.items():
        print(f"{name:8s} {median:.3f} s (median of {options.repeats}), {parameters[name]:,} parameters")


if __name__ == "__main__":
    main()
