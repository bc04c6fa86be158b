"""``metrics.jsonl``: every event of a run, one JSON object a line, each step once however often it was resumed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from addenda.train.events import Event, ResumeEvent, StartEvent

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """A listener that appends each event to a file and flushes it.

    When a run is resumed from the checkpoint of step n, lines of later steps are removed first, as those steps are
    run again. A run that is not resumed empties the file.

    Args:
        path: the file; its folder is made if needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, ResumeEvent):
            self._keep(event.step)
        elif isinstance(event, StartEvent) and not event.resumed:
            self._keep(-1)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_line(event), ensure_ascii=False) + "\n")

    def _keep(self, last_step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= last_step]
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8"
        )
        os.replace(beside, self.path)


def _line(event: Event) -> dict[str, Any]:
    name = type(event).__name__.removesuffix("Event").lower()
    return {"event": name, **dataclasses.asdict(event)}


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that a crash cut short is left out.

    Raises:
        json.JSONDecodeError: another line than the last is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]
