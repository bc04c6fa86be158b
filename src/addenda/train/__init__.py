"""Training: the loop, its settings, its events, its checkpoints; nothing heavy is imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addenda.train.config import TrainConfig as TrainConfig
    from addenda.train.events import CheckpointEvent as CheckpointEvent
    from addenda.train.events import EvalEvent as EvalEvent
    from addenda.train.events import Event as Event
    from addenda.train.events import NoticeEvent as NoticeEvent
    from addenda.train.events import OnEvent as OnEvent
    from addenda.train.events import ResumeEvent as ResumeEvent
    from addenda.train.events import StartEvent as StartEvent
    from addenda.train.events import StepEvent as StepEvent
    from addenda.train.interrupt import Interrupted as Interrupted
    from addenda.train.lock import lock_run as lock_run
    from addenda.train.loop import TrainResult as TrainResult
    from addenda.train.loop import train as train
    from addenda.train.memory import peak_memory_bytes as peak_memory_bytes
    from addenda.train.metrics import MetricsLog as MetricsLog
    from addenda.train.metrics import read_metrics as read_metrics
    from addenda.train.precision import Device as Device
    from addenda.train.precision import Precision as Precision
    from addenda.train.precision import choose_device as choose_device
    from addenda.train.precision import choose_precision as choose_precision
    from addenda.train.profile import StepProfile as StepProfile
    from addenda.train.profile import StepTimes as StepTimes

_PLACES = {
    "CheckpointEvent": "events",
    "Device": "precision",
    "EvalEvent": "events",
    "Event": "events",
    "Interrupted": "interrupt",
    "MetricsLog": "metrics",
    "NoticeEvent": "events",
    "OnEvent": "events",
    "Precision": "precision",
    "ResumeEvent": "events",
    "StartEvent": "events",
    "StepEvent": "events",
    "StepProfile": "profile",
    "StepTimes": "profile",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "choose_device": "precision",
    "choose_precision": "precision",
    "lock_run": "lock",
    "peak_memory_bytes": "memory",
    "read_metrics": "metrics",
    "train": "loop",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
