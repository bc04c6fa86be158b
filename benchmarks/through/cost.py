"""What a training step costs through a format, beside one without: processor time of one thread, in turns.

    python benchmarks/through/cost.py

Writes ``results/cost.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from run import RANK, VERSIONS
from torch import nn

import addenda
from addenda import kernels
from addenda.bases.packed import PackedModel
from addenda.memory.arena import Arena
from addenda.train.evaluation import training_mode

HERE = Path(__file__).resolve().parent
ROUNDS = 5


class Steps:
    """One base with an adapter for each format, and the time that a step with each takes."""

    def __init__(self, weights: str, names: Sequence[str], targets: str | list[str]) -> None:
        self.model: nn.Module = addenda.load_base(
            "smollm2-135m-instruct", weights=weights, dtype=torch.float32
        ).model
        self.names = ["plain", *names]
        for name in self.names:
            through = None if name == "plain" else name
            handle = addenda.attach(self.model, addenda.LoRA(rank=RANK), targets, name=name, through=through)
            for parameter in handle.parameters():
                nn.init.normal_(parameter, std=0.02)
        self.packed, self.arena = PackedModel(self.model), Arena(2**31)

    def step(self, name: str, tokens: int) -> float:
        """Run both ways with one adapter; return the processor time."""
        addenda.activate(self.model, [name])
        ids, started = torch.randint(0, 49_000, (tokens,)), time.process_time()
        with training_mode(self.model, addenda.handles(self.model)[name]), self.arena.serving():
            self.packed.hidden(ids, [tokens // 4] * 4).square().mean().backward()
        return time.process_time() - started

    def timed(self, tokens: int) -> dict[str, list[float]]:
        """Return the times of each adapter's steps, without the first."""
        times: dict[str, list[float]] = {name: [] for name in self.names}
        for _ in range(ROUNDS + 1):
            for name in self.names:
                times[name].append(self.step(name, tokens))
        return {name: each[1:] for name, each in times.items()}


def main() -> None:
    """Measure micro-batches of two sizes over dense and packed weights."""
    torch.set_num_threads(1)
    kernels.enable()
    found = []
    every: list[tuple[str, list[str], str | list[str]]] = [
        ("dense", ["q4_0", "q4_1", "q8_0", "nf4"], "all-linear"),
        ("packed", ["q4_1"], "all-linear"),
        ("dense", ["q4_k"], ["down_proj"]),
    ]
    for weights, names, targets in every:
        steps = Steps(weights, names, targets)
        for tokens in (256, 1024):
            times = steps.timed(tokens)
            plain = statistics.median(times["plain"])
            for name, each in times.items():
                line: dict[str, Any] = {
                    "weights": weights,
                    "targets": targets if isinstance(targets, str) else targets[0],
                    "tokens": tokens,
                    "through": name,
                    "seconds": statistics.median(each),
                    "ratio": statistics.median(each) / plain,
                    "all": each,
                }
                found.append(line)
                print(line, flush=True)
    text = json.dumps({"clock": "processor time", "versions": VERSIONS, "steps": found}, indent=1) + "\n"
    (HERE / "results" / "cost.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
