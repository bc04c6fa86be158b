"""HRA in PEFT's folder: one ``hra_u`` a layer, (d_in, rank)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.layers import uneven_convolutions
from addenda.methods.hra import HRA, HRAAdapter

__all__ = ["HRAForm"]


@form
class HRAForm(Form):
    """PEFT's ``HRAConfig``."""

    peft_type = "HRA"
    method = HRA
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    reads: ClassVar[tuple[str, ...]] = ("r", "apply_GS")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = ("hra_u",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(HRA, handle.method)
        paired = not method.orthonormal and method.rank % 2 == 0
        return {"r": method.rank, "apply_GS": method.orthonormal, "init_weights": paired, "bias": "none"}

    def problems(self, handle: Handle) -> list[str]:
        uneven = uneven_convolutions(handle)
        return (
            [f"PEFT runs {len(uneven)} of the convolutions otherwise, first '{uneven[0]}'"] if uneven else []
        )

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return HRA(rank=config.get("r", 8), orthonormal=bool(config.get("apply_GS")))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {"hra_u": cast(HRAAdapter, adapter).vectors.t()}
