"""Are the compiled kernels worth having on machines with narrower registers too?

    python benchmarks/instruction_sets/run.py

Compiles them for AVX-512 and for AVX2, keeps PyTorch to the same instructions, and times each kernel beside what
PyTorch does in its place, and a training step of SmolLM2-135M with the kernels and without: processor time of one
thread, in turns, medians. Writes ``results.json`` and the README's table.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

import addenda
from addenda.bases import formats
from addenda.bases.packed import PackedModel
from addenda.kernels import build, calls, kernels_off, library
from addenda.train.evaluation import training_mode

HERE = Path(__file__).resolve().parent
SETS = {"AVX-512": ("x86-64-v4", "avx512", "AVX512"), "AVX2": ("x86-64-v3", "avx2", "AVX2")}
"""What the compiler, PyTorch and its libraries call each."""
ROUNDS = 7
VERSIONS = {name: importlib.metadata.version(name) for name in ("addenda", "torch")}

Contestants = dict[str, Callable[[], object]]


def kernels() -> dict[str, Contestants]:
    """Return each kernel and what PyTorch does in its place; sizes are those of SmolLM2-135M."""
    x, ones, gate, up = torch.randn(512, 576), torch.ones(576), torch.randn(512, 1536), torch.randn(512, 1536)
    scores, targets = torch.randn(128, 49152), torch.randint(0, 49152, (128,))
    query, key, value = (torch.randn(n, 512, 64) for n in (9, 3, 3))
    call = calls.AttentionCall(query, key, value, None, [(0, 512)], scaling=0.125)
    answered = calls.attention_forward(call)
    leaves = [t[None].clone().requires_grad_() for t in (query, key, value)]

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)

    def backward() -> object:
        return torch.autograd.grad(attention(*leaves).sum(), leaves)

    def loss() -> object:
        leaf = scores.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(leaf, targets, reduction="sum"), leaf)

    def both() -> object:
        return calls.attention_backward(call, *calls.attention_forward(call), answered[0])

    found: dict[str, Contestants] = {
        "RMS norm": {
            "kernel": lambda: calls.rms_norm_forward(x, ones, 1e-5, 0.0),
            "PyTorch": lambda: F.rms_norm(x, (576,), ones, 1e-5),
        },
        "gated MLP's middle": {
            "kernel": lambda: calls.gated_forward(gate, up, "silu"),
            "PyTorch": lambda: F.silu(gate) * up,
        },
        "cross-entropy and its gradient": {
            "kernel": lambda: calls.cross_entropy(scores.clone(), targets, gradient=True),
            "PyTorch": loss,
        },
        "attention": {
            "kernel": lambda: calls.attention_forward(call),
            "PyTorch": lambda: attention(*leaves).detach(),
        },
        "attention both ways": {"kernel": both, "PyTorch": backward},
    }
    weight = torch.randn(576, 1536) * 0.02
    for name in ("Q4_1", "NF4", "Q4_K"):
        found |= {f"{way} {name}": each for way, each in packing(name, weight).items()}
    return found


def packing(name: str, weight: torch.Tensor) -> dict[str, Contestants]:
    """Return packing and unpacking in a format; what stands in for the kernels of Q4_K is ggml."""
    entry = formats.get(name)
    raw = entry.quantize(weight)

    def plain(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with kernels_off():
                return function()

        return run

    def unpack() -> object:
        return entry.dequantize(raw, weight.shape[1])

    def pack() -> object:
        return entry.quantize(weight)

    return {
        "unpack": {"kernel": unpack, "PyTorch": plain(unpack)},
        "pack": {"kernel": pack, "PyTorch": plain(pack)},
    }


def step() -> Contestants:
    """Return a training step of four rows of 128 tokens, both ways through all blocks of packed weights."""
    model = addenda.load_base("smollm2-135m-instruct", weights="packed", dtype=torch.float32).model
    handle, packed = addenda.attach(model, addenda.LoRA(rank=16), "all-linear"), PackedModel(model)
    ids = torch.randint(0, 49_000, (512,))

    def run(*, without: bool) -> None:
        with kernels_off() if without else nullcontext(), training_mode(model, handle):
            packed.hidden(ids, [128] * 4).square().mean().backward()

    return {"kernel": lambda: run(without=False), "PyTorch": lambda: run(without=True)}


def timed(contestants: Contestants) -> dict[str, float]:
    """Return the median time of each in milliseconds, the first round left out."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS + 1):
        for name, function in contestants.items():
            started = time.process_time()
            function()
            times[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def one_set(name: str) -> None:
    """Measure under one instruction set, and print the result as JSON."""
    torch.set_num_threads(1)
    library._State.library = ctypes.CDLL(str(build.build(SETS[name][0])))
    every = kernels() | {"training step": step()}
    print(json.dumps({what: timed(each) for what, each in every.items()}))


def main() -> None:
    """Measure each set in a process of its own, since PyTorch asks for its limits when it starts."""
    found = {}
    for name, (_, torch_name, other) in SETS.items():
        limits = {
            "ATEN_CPU_CAPABILITY": torch_name,
            "ONEDNN_MAX_CPU_ISA": other,
            "MKL_ENABLE_INSTRUCTIONS": other,
        }
        said = subprocess.run(
            [sys.executable, __file__, name],
            env=os.environ | limits,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[name] = json.loads(said.stdout.splitlines()[-1])
    (HERE / "results.json").write_text(
        json.dumps({"clock": "processor time, ms", "versions": VERSIONS, "sets": found}, indent=1) + "\n"
    )
    write_table(found)


def write_table(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Put the table into the README."""
    heads = "".join(f" {name}: kernel, ms | PyTorch, ms | ratio |" for name in found)
    lines = [f"| |{heads}", "|---|" + "---:|" * (3 * len(found))]
    for what in next(iter(found.values())):
        cells = ""
        for each in found.values():
            kernel, plain = each[what]["kernel"], each[what]["PyTorch"]
            cells += f" {kernel:,.2f} | {plain:,.2f} | {kernel / plain:.2f} |"
        lines.append(f"| {what} |{cells}")
    readme = HERE / "README.md"
    head, rest = readme.read_text(encoding="utf-8").split("<!-- table -->\n")
    tail = rest.split("<!-- end -->")[1]
    readme.write_text(
        head + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end -->" + tail, encoding="utf-8"
    )


if __name__ == "__main__":
    one_set(sys.argv[1]) if len(sys.argv) > 1 else main()
