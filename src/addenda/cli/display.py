"""What a run says while it works: progress, notes, steps, evaluations, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from addenda.cli.console import Console, binary_size, duration
from addenda.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from addenda.train import EvalEvent, StartEvent, StepEvent

__all__ = ["Display"]


class Display:
    """Shows every event of a run; a context manager, called with the events."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = ProgressDisplay(console)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.close()

    def __call__(self, event: Any) -> None:
        """Show one event: progress, a note of the run, or what the training loop tells."""
        # By name: importing the events' classes would cost every verb's help the start of torch.
        show = getattr(self, f"_{type(event).__name__.removesuffix('Event').lower()}")
        show(event)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.say(text)

    def _note(self, event: Any) -> None:
        self._bars.say(event.text)

    def _progress(self, event: Any) -> None:
        self._bars(event)

    def _notice(self, event: Any) -> None:
        self._bars.say(f"step {event.step}: {event.message}")

    def _start(self, event: StartEvent) -> None:
        path = f"{event.path}: {event.path_reason}"
        self._bars.say(
            f"training: {event.rows:,} rows, {event.epochs} epochs, {event.of_steps:,} steps, learning rate "
            f"{event.learning_rate:g}, {event.tokens_per_micro_batch:,} tokens at once, {event.machine}, "
            f"{_processes(event.processes)}"
            f"{event.dtype}; {path}"
        )
        self._bars.say(f"memory: {event.memory}")

    def _step(self, event: StepEvent) -> None:
        from addenda.core.progress import Progress

        detail = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s"
        self._bars(Progress("train", event.step, event.of_steps, "steps"), detail)

    def _eval(self, event: EvalEvent) -> None:
        best = ", the best so far" if event.best else ""
        nll = event.metrics["nll_per_token"]
        self._bars.say(f"step {event.step}: held-out nll {nll:.4f} nats per token{best}")

    def _checkpoint(self, event: Any) -> None:
        if self._console.verbosity >= 1:
            size = binary_size(event.bytes)
            self._bars.say(f"step {event.step}: saved {event.folder} ({size}, {duration(event.seconds)})")

    def _resume(self, event: Any) -> None:
        self._bars.say(f"resumed at step {event.step} from {event.folder}")
        for skipped in event.skipped:
            self._bars.say(f"  passed over: {skipped}")


def _processes(count: int) -> str:
    return f"{count} processes, " if count > 1 else ""
