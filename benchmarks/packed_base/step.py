"""One contestant in a process of its own: a base in one form, LoRA on every linear layer, a few training steps.

Prints one JSON object: the seconds of each step, the bytes of the weights in memory, and the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

import addenda
from addenda.bases.packed import PackedModel
from addenda.kernels.library import enable
from addenda.train.loss import packed_loss
from addenda.train.machine import set_allocator
from addenda.train.memory import peak_memory_bytes

ROW = 256
"""Tokens of a sample; half of them are predicted, as where answers are as long as questions."""


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; memory that two share counts once."""
    held: dict[int, int] = {}
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        held[tensor.data_ptr()] = max(held.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(held.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, attach and step."""
    torch.set_num_threads(options.threads)
    set_allocator(keep=not options.recompute)
    dtype = getattr(torch, options.dtype)
    base = addenda.load_base(options.base, weights=options.weights, dtype=dtype)
    enable()
    weights = weight_bytes(base.model)
    handle = addenda.attach(base.model, addenda.LoRA(rank=16), "all-linear")
    base.model.train()
    packed = PackedModel(base.model)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-4)
    seconds = []
    for step in range(options.warm_up + options.steps):
        started = time.perf_counter()
        one_step(packed, optimizer, options.tokens, step, recompute=packed.blocks if options.recompute else 0)
        seconds.append(time.perf_counter() - started)
    return {
        "weights": base.weights,
        "weight_bytes": weights,
        "seconds": seconds[options.warm_up :],
        "peak_bytes": peak_memory_bytes()["rss"],
    }


def one_step(
    packed: PackedModel, optimizer: torch.optim.Optimizer, tokens: int, step: int, *, recompute: int
) -> None:
    """Train on one micro-batch of random tokens; their values change no product's cost."""
    ids = torch.randint(5, 30_000, (tokens,), generator=torch.Generator().manual_seed(step))
    lengths = [min(ROW, tokens - start) for start in range(0, tokens, ROW)]
    places = torch.arange(tokens - 1)
    places = places[places % ROW >= ROW // 2]
    places = places[places % ROW < ROW - 1]
    hidden = packed.hidden(ids, lengths, recompute=recompute)
    packed_loss(packed, hidden, places, ids[places + 1], denominator=len(places)).backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Read the contestant, measure it, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("weights", choices=["dense", "packed"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--recompute", action="store_true", help="every block runs again in the backward")
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
