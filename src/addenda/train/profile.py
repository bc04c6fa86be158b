"""Where the time of a step goes: the parts of a few steps, and how much of the machine's product rate they use.

The share counts the work that a step cannot do without (`necessary_flop`), not what was done: whoever runs blocks again
or fills rows up pays with a smaller share.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from addenda.core.handle import Handle
from addenda.train.events import Event, OnEvent, StartEvent, StepEvent

__all__ = ["StepProfile", "StepTimes", "necessary_flop", "product_rate"]

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("_SegmentAttention", "aten::_scaled_dot_product", "aten::_flash")),
    ("norms", ("_RmsNorm", "aten::native_layer_norm")),
    ("gated MLP, between its products", ("_GatedMLP", "_Gated", "_Activation", "aten::silu", "aten::gelu")),
    ("loss, beside its products", ("_ChunkedNll", "aten::_softmax", "aten::_log_softmax", "aten::logsumexp")),
    (
        "matrix products",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::", "_PackedProduct"),
    ),
    ("optimizer", ("Optimizer.", "aten::_fused_adamw")),
)
"""Parts of a step, and how the names of the operations begin that belong to each; the first that fits counts."""

OTHER = "all else"


@dataclass(frozen=True)
class StepTimes:
    """What some steps took."""

    steps: int
    tokens: int
    """Tokens of those steps."""
    trained_tokens: int
    seconds: float
    """From the first to the last, measurement included."""
    parts: Mapping[str, float]
    """Seconds of each part, on the thread that calls; the parts add up to about ``seconds``."""
    flop: float
    """What the steps could not do without."""
    product_flop_per_second: float
    """What the machine reaches on large products in the base's number format, measured beside the run."""

    @property
    def share(self) -> float:
        """Necessary work by time, as a share of the machine's product rate."""
        return self.flop / self.seconds / self.product_flop_per_second

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        rows = sorted(self.parts.items(), key=lambda row: -row[1])
        lines = [
            f"{name:<34}{1e3 * value / self.steps:9.1f} ms a step {value / self.seconds:7.1%}"
            for name, value in rows
        ]
        rate = self.product_flop_per_second / 1e9
        return "\n".join(
            [
                f"profile of {self.steps} steps, {self.tokens:,} tokens, {self.tokens / self.seconds:,.0f} tokens/s",
                *lines,
                f"{self.share:.0%} of the machine's product rate ({rate:,.0f} GFLOP/s) by necessary work "
                f"({self.flop / self.steps / 1e9:,.0f} GFLOP a step)",
            ]
        )


class StepProfile:
    """Listens to a run, and measures some of its steps; give it to `train` as ``on_event``, in a ``with`` block.

    The block ends the profiler of a run that was over too soon: PyTorch's, left running, takes the process down at its
    end.

    Args:
        handle: the adapter that is trained.
        on_event: told of everything, as without a profile.
        skip: steps before the first that is measured; the first ones meet cold caches.
        steps: steps to measure. What the profiler notes lies among the blocks that a step gives back, so that the
            heap grows by the activations of a micro-batch or so with each.
    """

    times: StepTimes | None = None
    """The result, once the steps are over; None before, and after a run too short."""

    def __init__(self, handle: Handle, on_event: OnEvent, *, skip: int = 2, steps: int = 2) -> None:
        self._handle, self._on_event, self._skip, self._steps = handle, on_event, skip, steps
        self._profiler: Any = None
        self._seen: list[StepEvent] = []
        self._began = 0.0
        self._first = 0

    def __enter__(self) -> StepProfile:
        """Begin to listen."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the profiler if it still runs."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self._on_event(event)
        if isinstance(event, StartEvent):
            self._first = event.step
        if not isinstance(event, StepEvent) or self.times is not None:
            return
        if self._profiler is not None:
            self._seen.append(event)
            if len(self._seen) == self._steps:
                self._finish()
        elif event.step - self._first >= self._skip:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._began = time.perf_counter()

    def _finish(self) -> None:
        seconds = time.perf_counter() - self._began
        self._profiler.stop()
        parts = dict.fromkeys([name for name, _ in PARTS] + [OTHER], 0.0)
        for row in self._profiler.key_averages():
            parts[_part_of(row.key)] += row.self_cpu_time_total / 1e6
        self._profiler = None
        tokens, trained = (sum(getattr(e, name) for e in self._seen) for name in ("tokens", "trained_tokens"))
        model = self._handle.model
        self.times = StepTimes(
            steps=len(self._seen),
            tokens=tokens,
            trained_tokens=trained,
            seconds=seconds,
            parts=parts,
            flop=necessary_flop(self._handle, tokens=tokens, trained_tokens=trained),
            product_flop_per_second=product_rate(next(p for p in model.parameters() if not p.requires_grad)),
        )


def _part_of(operation: str) -> str:
    name = operation.removeprefix("autograd::engine::evaluate_function: ")
    return next((part for part, begins in PARTS if name.startswith(begins)), OTHER)


def necessary_flop(handle: Handle, *, tokens: int, trained_tokens: int) -> float:
    """Return the floating-point operations that no implementation of the step can leave out.

    A frozen linear layer takes a product forward and one backward (the gradient of its input; that of its weight is not
    needed), 4 operations for each weight and token; the output head likewise, at trained tokens only; a trained number
    6. Attention's products depend on the lengths, are few for short samples, and are left out.
    """
    model: Any = handle.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = sum(_weights(module) for module in model.modules() if module is not head)
    scored = _weights(head) if isinstance(head, nn.Module) else 0
    return 4.0 * linear * tokens + 4.0 * scored * trained_tokens + 6.0 * handle.trainable_parameters * tokens


def _weights(module: nn.Module) -> int:
    """Numbers in the weight of a linear layer, adapted, packed or not; 0 of anything else."""
    sizes = [getattr(module, name, 0) for name in ("in_features", "out_features")]
    if type(module).__name__.endswith("Conv1D"):  # of transformers: a linear layer with its weight turned
        sizes = list(module.get_parameter("weight").shape)
    return sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else 0


def product_rate(like: torch.Tensor, *, size: int = 2048, repeats: int = 5) -> float:
    """Return the floating-point operations a second of a large product, in the dtype and on the device of ``like``."""
    x = torch.randn(size, size, device=like.device).to(
        like.dtype if like.is_floating_point() else torch.float32
    )
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(x, x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
