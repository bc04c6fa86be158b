"""The stopwatch that every contestant carries: steps after the warm-up, and the real tokens in them."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["StepClock", "gpu_memory", "memory_now", "write_result"]


class StepClock:
    """Marks the end of each optimiser step; only steps after the warm-up count.

    What lies between two marks is timed: reading and collating the batch, forward, backward, clipping, the update
    and the trainer's own bookkeeping. Loading the model, preparing the data and saving lie outside.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self._marks: list[float] = []
        self._tokens: list[int] = []

    def step_done(self, tokens: int) -> None:
        """Note that a step over ``tokens`` real tokens (no padding) has just ended."""
        if torch := _torch_on_gpu():
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())
        self._tokens.append(tokens)

    def measured(self) -> dict[str, Any]:
        """Return the timed steps, their seconds and tokens, and tokens per second over all of them."""
        marks, tokens = self._marks[self.warmup_steps - 1 :], self._tokens[self.warmup_steps :]
        seconds = marks[-1] - marks[0]
        return {
            "warmup_steps": self.warmup_steps,
            "timed_steps": len(tokens),
            "timed_tokens": sum(tokens),
            "timed_seconds": round(seconds, 3),
            "tokens_per_second": round(sum(tokens) / seconds, 1),
            "step_seconds": [round(b - a, 3) for a, b in itertools.pairwise(marks)],
            "step_tokens": tokens,
        }


def memory_now() -> int:
    """Return the peak resident bytes of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_memory() -> dict[str, int]:
    """Return the most that PyTorch held of the GPU so far, in use and reserved; nothing without a GPU."""
    torch = _torch_on_gpu()
    if torch is None:
        return {}
    used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"gpu_peak_bytes": used, "gpu_peak_reserved_bytes": reserved}


def _torch_on_gpu() -> Any:
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def write_result(path: str, **facts: Any) -> None:
    """Write what a contestant measured, for the orchestrator to read."""
    Path(path).write_text(json.dumps(facts), encoding="utf-8")
