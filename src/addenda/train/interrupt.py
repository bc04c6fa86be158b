"""Ctrl-C and SIGTERM: save first, then leave; a second signal leaves at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and its state is saved.

    Args:
        signum: the signal that stopped it; 0 where none did.
        checkpoint: folder of the checkpoint from which the run can be resumed, or "" if there is none yet.
    """

    def __init__(self, signum: int, checkpoint: str = "") -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        super().__init__(f"interrupted; saved in '{checkpoint}'" if checkpoint else "interrupted")

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signum or signal.SIGINT)


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a wish that the loop looks at between micro-batches.

    A context manager. From the first signal on, the system's own handling is back, so that a second one ends the
    process at once, even inside a long computation. Python delivers signals to the main thread only: used in another
    thread, this catches none, and :attr:`active` is False.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.active = False
        self._at_once = False
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signum != 0

    def __enter__(self) -> Interrupts:
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)
        if self._at_once:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def at_once(self, *, alone: bool = True) -> Iterator[None]:
        """Inside, the first signal raises :class:`Interrupted` right away; for work that changes no state.

        Not so where the work is shared with other processes: they would wait for this one.
        """
        self._at_once = alone
        try:
            yield
        finally:
            self._at_once = False
