"""(IA)3 in PEFT's folder: one ``ia3_l`` a layer, (1, d_in) where the input is scaled, else (d_out, 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.targets import matches
from addenda.export.peft.form import Form, form
from addenda.methods.ia3 import IA3, IA3Adapter

__all__ = ["IA3Form"]


@form
class IA3Form(Form):
    """PEFT's ``IA3Config``."""

    peft_type = "IA3"
    method = IA3
    reads: ClassVar[tuple[str, ...]] = ("feedforward_modules",)
    harmless: ClassVar[tuple[str, ...]] = ("init_ia3_weights",)
    names: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        inner = [path for path, adapter in handle.adapters.items() if cast(IA3Adapter, adapter).at_input]
        # PEFT asks that every entry of feedforward_modules be one of target_modules, so both are whole paths.
        return {
            "target_modules": sorted(handle.paths),
            "feedforward_modules": sorted(inner),
            "init_ia3_weights": True,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        inner = config.get("feedforward_modules") or []
        return IA3(feed_forward=tuple(path for path in paths if any(matches(path, entry) for entry in inner)))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(IA3Adapter, adapter)
        return {"ia3_l": ours.scale[None, :] if ours.at_input else ours.scale[:, None]}
