"""Run one exported graph, or the PyTorch model it was made from, in a process of its own; prints JSON.

    python benchmarks/edge/onnx_step.py onnx FILE ROW.npz [ADAPTER ...]
    python benchmarks/edge/onnx_step.py torch FILE.pt ROW.npz

Nothing but what a device needs is imported: numpy and ONNX Runtime, or PyTorch and the model's own code.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM, TIMED = 5, 40


def main() -> None:
    kind, path, row, *adapters = sys.argv[1:]
    inputs = dict(np.load(row))
    begun = time.perf_counter()
    run = of_torch(path, inputs) if kind == "torch" else of_onnx(path, inputs, adapters)
    run(0)
    first = time.perf_counter() - begun
    seconds = [timed(run, number) for number in range(WARM + TIMED)][WARM:]
    status = Path("/proc/self/status").read_text()  # what resource tells counts the parent of the process too
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(json.dumps({"seconds": seconds, "load_and_first_seconds": first, "peak_bytes": peak}))


def timed(run: Callable[[int], Any], number: int) -> float:
    """Seconds of the processor, of which there is one thread: others on the machine make it no longer."""
    begun = time.process_time()
    run(number)
    return time.process_time() - begun


def of_onnx(path: str, inputs: dict[str, np.ndarray], adapters: list[str]) -> Callable[[int], Any]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    choices, kept = [], []
    for each in adapters:
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(each)
        options.add_active_adapter(adapter)
        kept.append(adapter)
        choices.append(options)

    def run(number: int, _kept: Any = kept) -> Any:
        return session.run(None, inputs, choices[number % len(choices)] if choices else None)

    return run


def of_torch(path: str, inputs: dict[str, np.ndarray]) -> Callable[[int], Any]:
    import torch

    torch.set_num_threads(1)
    model = torch.load(path, weights_only=False, mmap=True)  # a file that onnx_run.py has just written
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def run(_number: int) -> Any:
        with torch.inference_mode():
            return model(**tensors)

    return run


if __name__ == "__main__":
    main()
