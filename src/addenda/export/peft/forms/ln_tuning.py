"""LN-tuning in PEFT's folder: a copy of each norm, ``ln_tuning_layers.weight`` and, where it has one, ``.bias``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.whole import WholeAdapter
from addenda.export.peft.form import Form, form
from addenda.export.peft.values import set_values, values
from addenda.methods.ln_tuning import LNTuning

__all__ = ["LNTuningForm"]

_COPY = "ln_tuning_layers."


@form
class LNTuningForm(Form):
    """PEFT's ``LNTuningConfig``."""

    peft_type = "LN_TUNING"
    method = LNTuning
    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    reads: ClassVar[tuple[str, ...]] = ()
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = (f"{_COPY}weight", f"{_COPY}bias")

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return LNTuning()

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {f"{_COPY}{name}": value for name, value in values(cast(WholeAdapter, adapter), layer).items()}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        copied = {name.removeprefix(_COPY): value for name, value in given.items()}
        set_values(cast(WholeAdapter, adapter), layer, copied)
