"""BEFT in PEFT's folder: one ``beft_bias`` (1, d_out) a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.beft import BEFT
from addenda.methods.bitfit import BitFitAdapter

__all__ = ["BEFTForm"]


@form
class BEFTForm(Form):
    """PEFT's ``BeftConfig``."""

    peft_type = "BEFT"
    method = BEFT
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ()
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    names: ClassVar[tuple[str, ...]] = ("beft_bias",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return BEFT()

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {"beft_bias": cast(BitFitAdapter, adapter).offset[None]}
