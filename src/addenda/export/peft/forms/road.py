"""RoAd in PEFT's folder: angles and factors of each layer in a row, as ``road_theta`` and ``road_alpha``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.road import RoAd, RoAdAdapter

__all__ = ["RoAdForm"]


@form
class RoAdForm(Form):
    """PEFT's ``RoadConfig``."""

    peft_type = "ROAD"
    method = RoAd
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("variant", "group_size")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = ("road_theta", "road_alpha")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(RoAd, handle.method)
        return {"variant": f"road_{method.variant}", "group_size": method.group_size}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        variant = {"road_1": 1, "road_2": 2, "road_4": 4}.get(name := config.get("variant", "road_1"), name)
        return RoAd(variant=variant, group_size=config.get("group_size", 64))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(RoAdAdapter, adapter)
        return {"road_theta": ours.theta.view(-1), "road_alpha": ours.alpha.view(-1)}
