"""What is to be exported, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from addenda.bases import LoadedBase
from addenda.core.handle import Handle
from addenda.core.packed_layers import packed_numel
from addenda.core.progress import OnProgress, Progress
from addenda.export.probes import Probes, Row

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """One adapter on its model, on the way into one format."""

    model: nn.Module
    """In evaluation mode, best in float32, with the adapter at work."""
    handle: Handle
    probes: Probes
    """What the written file and the model are both asked."""
    base: LoadedBase | None = None
    """What the model was loaded as; None for a module that somebody built."""
    type: str | None = None
    """One of the format's types; None where it has none."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter's manifest says of its training."""
    on_progress: OnProgress | None = None
    calibration: tuple[Row, ...] = ()
    """Rows of the task, for types that round with care; never those of `probes`."""
    context: int | None = None
    """Tokens for which the file sets a key-value cache aside; None for the format's usual number."""
    kept: dict[str, Any] = field(default_factory=dict, compare=False)
    """What a format has worked out once, for writing and for reading back."""

    @property
    def numbers(self) -> int:
        """Numbers in the model's weights, packed ones and the adapter's among them."""
        return sum(each.numel() for each in self.model.parameters()) + packed_numel(self.model)

    @property
    def title(self) -> str:
        """Name of what the adapter stands on."""
        return self.base.name if self.base else type(self.model).__name__

    def say(self, task: str, done: float, total: float, unit: str) -> None:
        """Report progress to whoever watches."""
        if self.on_progress:
            self.on_progress(Progress(task, done, total, unit))
