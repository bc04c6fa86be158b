"""OSF in PEFT's folder: the trained factors alone; what they were at the start is computed anew from the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.targets import at
from addenda.export.peft.form import Form, form
from addenda.methods.osf import OSF, OSFAdapter

__all__ = ["OSFForm"]


@form
class OSFForm(Form):
    """PEFT's ``OSFConfig``."""

    peft_type = "OSF"
    method = OSF
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("effective_rank", "rank_pattern")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "target_svd_config")
    names: ClassVar[tuple[str, ...]] = tuple(f"osf_svd_params.{name}_low" for name in "USV")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(OSF, handle.method)
        kept = {path: at(path, method.kept_in, method.kept) for path in handle.paths}
        # PEFT takes the first entry that occurs anywhere in a layer's name, so the longest come first.
        longest = sorted(handle.paths, key=len, reverse=True) if method.kept_in else []
        return {"effective_rank": method.kept, "rank_pattern": {path: kept[path] for path in longest} or None}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        patterns = config.get("rank_pattern") or {}
        found = {path: [kept for entry, kept in patterns.items() if re.search(entry, path)] for path in paths}
        kept = config.get("effective_rank")
        return OSF(
            kept=0.5 if kept is None else kept,
            kept_in={path: entries[0] for path, entries in found.items() if entries},
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(OSFAdapter, adapter)
        factors = {"U": ours.U, "S": ours.S, "V": ours.V}
        return {f"osf_svd_params.{name}_low": factor for name, factor in factors.items()}

    def prepare(self, adapter: Adapter, layer: Base, method: Method) -> None:
        cast(OSFAdapter, adapter).start_from(layer.weight())
