"""A folder that PEFT loads unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from addenda.bases import LoadedBase
from addenda.core.handle import Handle
from addenda.core.planning import Plan
from addenda.core.progress import OnProgress
from addenda.core.whole import is_whole
from addenda.export.format import Format
from addenda.export.parity import Parity
from addenda.export.peft import export_peft
from addenda.export.peft.folder import layers_without
from addenda.export.peft.form import form_for

__all__ = ["FORMAT", "PEFTFolder"]


class PEFTFolder(Format):
    """Configuration and tensors under PEFT's names, for every method that PEFT has."""

    def problems(self, planned: Plan, base: LoadedBase) -> list[str]:
        method, form = planned.method, form_for(planned.method)
        if form is None:
            return [f"PEFT has no method '{method.name}'"]
        own = [row.path for row in planned.rows if not is_whole(method, row.path)]
        found = []
        if planned.through is not None:
            found.append(
                f"PEFT adds to the weight as it is, and what is trained through {planned.through} to a rounded one"
            )
        if other := layers_without(form, base.model, own):
            found.append(
                f"PEFT's {form.peft_type} has no form for {len(other)} of the layers, first '{other[0]}'"
            )
        if method.whole and "modules_to_save" in form.unknown:
            found.append(f"PEFT's {form.peft_type} has no modules_to_save")
        return found

    def write(
        self,
        base: LoadedBase,
        handle: Handle,
        folder: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Parity:
        return export_peft(base, handle, folder, provenance=provenance, on_progress=on_progress)


FORMAT = PEFTFolder()
