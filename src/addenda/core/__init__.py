"""What adapting a model means: the contract, the host, and the life of an adapter; loaded at the first use.

Rooms that need no model take what is free of PyTorch from here (``progress``, ``ranges``, ``registry``), and start at
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addenda.core.activating import activate as activate
    from addenda.core.activating import activated as activated
    from addenda.core.activating import active_composition as active_composition
    from addenda.core.arrow import Arrow as Arrow
    from addenda.core.attaching import attach as attach
    from addenda.core.attaching import detach as detach
    from addenda.core.combining import combine as combine
    from addenda.core.composition import Composition as Composition
    from addenda.core.composition import Rows as Rows
    from addenda.core.composition import Stack as Stack
    from addenda.core.composition import Sum as Sum
    from addenda.core.composition import average as average
    from addenda.core.composition import parallel as parallel
    from addenda.core.contract import Adapter as Adapter
    from addenda.core.contract import Base as Base
    from addenda.core.contract import Method as Method
    from addenda.core.fingerprints import fingerprint as fingerprint
    from addenda.core.handle import Handle as Handle
    from addenda.core.handle import handles as handles
    from addenda.core.observations import Observed as Observed
    from addenda.core.observing import observe as observe
    from addenda.core.planning import Plan as Plan
    from addenda.core.planning import PlannedLayer as PlannedLayer
    from addenda.core.planning import plan as plan
    from addenda.core.progress import OnProgress as OnProgress
    from addenda.core.progress import Progress as Progress
    from addenda.core.several import load_all as load_all
    from addenda.core.several import save_all as save_all
    from addenda.core.state import load as load
    from addenda.core.state import read_manifest as read_manifest
    from addenda.core.state import save as save

# A file must not have the name of something it offers: loading the file would hide the thing behind it.
_PLACES = {
    "Adapter": "contract",
    "Arrow": "arrow",
    "Base": "contract",
    "Composition": "composition",
    "Handle": "handle",
    "Method": "contract",
    "Observed": "observations",
    "OnProgress": "progress",
    "Plan": "planning",
    "PlannedLayer": "planning",
    "Progress": "progress",
    "Rows": "composition",
    "Stack": "composition",
    "Sum": "composition",
    "activate": "activating",
    "activated": "activating",
    "active_composition": "activating",
    "attach": "attaching",
    "average": "composition",
    "combine": "combining",
    "detach": "attaching",
    "fingerprint": "fingerprints",
    "handles": "handle",
    "load": "state",
    "load_all": "several",
    "observe": "observing",
    "parallel": "composition",
    "plan": "planning",
    "read_manifest": "state",
    "save": "state",
    "save_all": "several",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
