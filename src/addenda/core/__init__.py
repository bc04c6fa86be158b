"""What adapting a model means: the contract, the host, and the life of an adapter."""

from __future__ import annotations

from addenda.core.attach import attach as attach
from addenda.core.attach import detach as detach
from addenda.core.contract import Adapter as Adapter
from addenda.core.contract import Base as Base
from addenda.core.contract import Method as Method
from addenda.core.fingerprint import fingerprint as fingerprint
from addenda.core.handle import Handle as Handle
from addenda.core.handle import handles as handles
from addenda.core.plan import Plan as Plan
from addenda.core.plan import PlannedLayer as PlannedLayer
from addenda.core.plan import plan as plan
from addenda.core.progress import OnProgress as OnProgress
from addenda.core.progress import Progress as Progress
from addenda.core.state import load as load
from addenda.core.state import read_manifest as read_manifest
from addenda.core.state import save as save

__all__ = [
    "Adapter",
    "Base",
    "Handle",
    "Method",
    "OnProgress",
    "Plan",
    "PlannedLayer",
    "Progress",
    "attach",
    "detach",
    "fingerprint",
    "handles",
    "load",
    "plan",
    "read_manifest",
    "save",
]
