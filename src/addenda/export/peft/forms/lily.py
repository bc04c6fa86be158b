"""Lily in PEFT's folder: every layer has its factors, those too that it shares, and its router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.lily import Lily, LilyAdapter

__all__ = ["LilyForm"]


@form
class LilyForm(Form):
    """PEFT's ``LilyConfig``."""

    peft_type = "LILY"
    method = Lily
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "stride_A", "num_B", "scaling")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = ("lily_A.weight", "lily_B.weight", "lily_router.weight")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(Lily, handle.method)
        return {
            "r": method.rank,
            "stride_A": method.stride,
            "num_B": method.experts,
            "scaling": method.scaling,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return Lily(
            rank=config.get("r", 32),
            stride=config.get("stride_A", 1),
            experts=config.get("num_B", 2),
            scaling=config.get("scaling", 1.0),
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(LilyAdapter, adapter)
        A, B = ours.factors()
        return dict(zip(self.names, (A, B.flatten(0, 1), ours.router), strict=True))
