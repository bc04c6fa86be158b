"""Many recipes on the same rows and base: what to try, by grid or by search, and how the trials stand."""

from __future__ import annotations

from addenda.sweeps.runner import (
    SWEEP_RECIPE,
    Sweep,
    SweepPlan,
    SweepSummary,
    plan_sweep,
    read_sweep_table,
    sweep,
)
from addenda.sweeps.space import Source, parse_axes
from addenda.sweeps.trials import Standing

__all__ = [
    "SWEEP_RECIPE",
    "Source",
    "Standing",
    "Sweep",
    "SweepPlan",
    "SweepSummary",
    "parse_axes",
    "plan_sweep",
    "read_sweep_table",
    "sweep",
]
